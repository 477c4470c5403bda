"""What a manifest may have opened: nothing that runs code, nothing elsewhere, but what the user vouches for."""

import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torchvision.datasets
import yaml
from pydantic import TypeAdapter

from logitcache.cache.snapshot import open_snapshot
from logitcache.cli import main
from logitcache.config import trust
from logitcache.errors import DataError, MismatchError, RecipeError, RefusedError
from logitcache.models import Model, Timm
from logitcache.stage_one.derive.derive import DeriveRecipe, derive
from logitcache.store.remote.client import Remote
from logitcache.teacher.online import live_targets
from logitcache.views.datasets import Dataset, ImageFolder, WebDataset
from tests.cache.made import FLIP_AND_CROP, forge, run, teacher, write_images

MODELS: TypeAdapter[Model] = TypeAdapter(Model)
DATASETS: TypeAdapter[Dataset] = TypeAdapter(Dataset)


def model(entry: dict[str, Any]) -> Model:
    return MODELS.validate_json(json.dumps(entry))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory of the test's own: what other tests wrote is not remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(trust.VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache of small images in a folder."""
    write_images(tmp_path / "images", {"a": 3, "b": 3})
    run(
        tmp_path / "c.zarr",
        dataset={"kind": "image_folder", "root": str(tmp_path / "images"), "labelled": False},
        teachers={"t": teacher()},
    )
    return tmp_path / "c.zarr"


def digest_of(cache: Path) -> str:
    """Return the digest that a cache states of its manifest."""
    digest: str = json.loads((cache / "zarr.json").read_bytes())["attributes"]["logitcache"]["sha256"]
    return digest


def from_elsewhere(cache: Path, dataset: dict[str, Any] | None = None, model: object = None) -> str:
    """Let a manifest name something else, as if it came from another machine; returns its digest."""

    def change(manifest: dict[str, Any]) -> None:
        if dataset is not None:
            manifest["dataset"] = DATASETS.validate_json(json.dumps(dataset)).model_dump(mode="json")
        if model is not None:
            manifest["teachers"]["t"]["model"] = model

    forge(cache, change)
    return open_snapshot(cache).identity


def student(cache: Path, out: Path, **changes: Any) -> Path:
    """Write a recipe of a student that learns for one step."""
    entries = {
        "cache": str(cache),
        "out": str(out),
        "model": {"kind": "small_cnn", "width": 2},
        "epochs": 1,
        "num_workers": 0,
        "device": "cpu",
        "losses": [{"kind": "kl_divergence"}],
        **changes,
    }
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(entries))
    return path


RISKY = {
    "run": {"kind": "run", "path": "runs/x"},
    "quantized": {"kind": "quantized", "path": "runs/x", "input_size": (32, 32)},
    "pruned": {"kind": "pruned", "path": "runs/x", "macs": 0.5},
    "checkpoint": {
        "kind": "checkpoint",
        "path": "w.pt",
        "model": {"kind": "torchvision", "name": "resnet18", "weights": None},
    },
    "custom": {"kind": "custom", "factory": "os:system"},
    "hub": {"kind": "timm", "name": "hf-hub:evil/x"},
    "hub_": {"kind": "timm", "name": "hf_hub:evil/x"},
    "HUB": {"kind": "timm", "name": "HF-HUB:evil/x"},
    "local": {"kind": "timm", "name": "local-dir:/tmp/x"},
    "path": {"kind": "timm", "name": "/tmp/x"},
    "answers": {"kind": "answers", "path": "c.zarr/x.npz", "whose": "theirs"},
    "transformers of a folder": {"kind": "transformers", "path": "c.zarr/x"},
    "transformers of the hub": {"kind": "transformers", "path": "hf://evil/x", "task": "features"},
    "checkpoint_path": {
        "kind": "timm",
        "name": "resnet18",
        "pretrained": False,
        "options": {"checkpoint_path": "c.zarr/w.pt"},
    },
    "pretrained_cfg": {"kind": "timm", "name": "resnet18", "options": {"pretrained_cfg": {"file": "w.pt"}}},
    "overlay": {"kind": "timm", "name": "resnet18", "options": {"pretrained_cfg_overlay": {"url": "http://evil"}}},
    "cache_dir": {"kind": "timm", "name": "resnet18", "options": {"cache_dir": "c.zarr"}},
    "rate": {"kind": "timm", "name": "resnet18", "options": {"drop_rate": "w.pt"}},
    "large": {"kind": "torchvision", "name": "resnet18", "weights": None, "options": {"width_per_group": 10**9}},
    "wide": {"kind": "small_cnn", "width": 10**9},
    "deep": {"kind": "small_cnn", "depth": 10**9},
}
PLAIN = [
    {"kind": "bundled"},
    {"kind": "small_cnn", "width": 32},
    {"kind": "timm", "name": "resnet50.a1_in1k"},
    {"kind": "timm", "name": "resnet18", "pretrained": False, "options": {"drop_rate": 0.1}},
    {"kind": "torchvision", "name": "googlenet", "weights": "DEFAULT", "options": {"transform_input": True}},
]


@pytest.mark.parametrize("name", RISKY)
def test_a_model_that_leads_to_a_path_a_hub_or_a_size_is_a_risk(name: str) -> None:
    assert model(RISKY[name]).risks()


@pytest.mark.parametrize("entry", PLAIN, ids=str)
def test_a_model_by_name_is_none(entry: dict[str, Any]) -> None:
    assert model(entry).risks() == ()


def test_every_kind_of_model_was_asked() -> None:
    kinds = {kind.model_fields["kind"].default for kind in get_args(get_args(Model)[0])}
    assert {entry["kind"] for entry in [*RISKY.values(), *PLAIN]} == kinds


def test_few_sets_of_torchvision_are_read_without_torchvision() -> None:
    names = [name for name in torchvision.datasets.__all__ if isinstance(getattr(torchvision.datasets, name), type)]
    plain = [
        name
        for name in names
        if not DATASETS.validate_python({"kind": "torchvision", "name": name, "root": "x"}).risks()
    ]
    assert sorted(plain) == ["CIFAR10", "CIFAR100", "FashionMNIST", "KMNIST", "MNIST"]
    options = {"kind": "torchvision", "name": "MNIST", "root": "x", "options": {"loader": "x"}}
    assert DATASETS.validate_python(options).risks()


ELSEWHERE = {
    "LSUN": {
        "kind": "torchvision",
        "name": "LSUN",
        "root": "/proc/self/cwd/x",
        "options": {"classes": ["bedroom_train"]},
    },
    "FakeData": {"kind": "torchvision", "name": "FakeData", "options": {"size": 10**9}},
    "ImageFolder": {"kind": "torchvision", "name": "ImageFolder", "root": "images"},
    "http": {"kind": "webdataset", "shards": "http://127.0.0.1:PORT/x-{0..3}.tar"},
    "one of many": {"kind": "webdataset", "shards": ["x-{0..3}.tar", "HTTP://127.0.0.1:PORT/x.tar"]},
    "ftp": {"kind": "image_folder", "root": "ftp://127.0.0.1:PORT/x"},
    "s3": {"kind": "image_folder", "root": "s3://bucket/x"},
    "file": {"kind": "image_folder", "root": "file:///etc"},
    "hub": {"kind": "huggingface", "path": "hf://datasets/evil/x"},
    "rows": {"kind": "huggingface", "path": "images"},
    "github": {"kind": "image_folder", "root": "github://a:b@/x"},
}


@pytest.fixture
def listener() -> Any:
    """A server of the network that notes who connects."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        seen: list[object] = []

        def accept() -> None:
            try:
                while True:
                    connection, address = server.accept()
                    seen.append(address)
                    connection.close()
            except OSError:
                return

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield server.getsockname()[1], seen
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_data_set_elsewhere_or_of_torchvisions_own_readers_is_a_risk(name: str) -> None:
    assert DATASETS.validate_json(json.dumps(ELSEWHERE[name]).replace("PORT", "9")).risks()


@pytest.mark.parametrize("name", ["LSUN", "http", "ftp"])
def test_a_data_set_that_only_a_manifest_names_is_opened_by_no_command(
    name: str, cache: Path, listener: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port, seen = listener
    digest = from_elsewhere(cache, json.loads(json.dumps(ELSEWHERE[name]).replace("PORT", str(port))))
    recipe = str(student(cache, tmp_path / "run"))
    for command in (["verify", str(cache)], ["train-student", recipe]):
        assert main(command) == 2, command
        error = capsys.readouterr().err
        assert f"trust: {digest}" in error, command
        assert f"--trust {digest}" in error
        assert f"{trust.VARIABLE}={digest}" in error
    assert seen == []


@pytest.fixture
def far(cache: Path, tmp_path: Path) -> tuple[Path, str]:
    """The cache as if its images were at a URL, and the digest of its manifest."""
    return cache, from_elsewhere(
        cache, {"kind": "image_folder", "root": f"file://{tmp_path}/images", "labelled": False}
    )


def refusal(capsys: pytest.CaptureFixture[str], command: list[str]) -> str:
    """Return what a command that must be refused prints."""
    capsys.readouterr()
    assert main(command) == 2
    return capsys.readouterr().err


def test_the_line_that_a_refusal_prints_opens_it_in_a_recipe(
    far: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = student(far[0], tmp_path / "run")
    [line] = re.findall(r"^    (trust: \w+)$", refusal(capsys, ["train-student", str(recipe)]), re.M)
    recipe.write_text(f"{recipe.read_text()}{line}\n")
    assert main(["train-student", str(recipe)]) == 0


@pytest.mark.parametrize("command", ["verify", "train-student"])
def test_the_option_and_the_variable_that_a_refusal_prints_open_it(
    command: str,
    far: tuple[Path, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = far[0] if command == "verify" else student(far[0], tmp_path / "run")
    error = refusal(capsys, [command, str(path)])
    [option] = re.findall(r"--trust \w+", error)
    assert main([command, str(path), *option.split()]) == 0
    [(name, value)] = re.findall(r"set (\w+)=(\w+)", error)
    monkeypatch.setenv(name, f"{'0' * 64},{value}")
    assert main([command, str(path), *([] if command == "verify" else ["--set", "out=again"])]) == 0


def test_the_users_own_word_for_the_images_needs_no_grant(far: tuple[Path, str], tmp_path: Path) -> None:
    here = f"dataset={{kind: image_folder, root: {tmp_path}/images, labelled: false}}"
    assert main(["verify", str(far[0]), "--set", here]) == 0
    assert main(["train-student", str(student(far[0], tmp_path / "run")), "--set", here]) == 0


def test_a_digest_of_another_manifest_opens_nothing(
    far: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(trust.VARIABLE, "0" * 64)
    assert main(["verify", str(far[0]), "--trust", far[1].upper()]) == 2
    assert "trust: " in capsys.readouterr().err
    recipe = student(far[0], tmp_path / "run", trust="all")
    assert main(["train-student", str(recipe)]) == 2
    assert "64 hexadecimal digits" in capsys.readouterr().err


def test_what_a_run_grants_is_not_what_the_user_grants(
    far: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = student(far[0], tmp_path / "run", trust=far[1], validation={"cache": str(far[0])})
    assert main(["train-student", str(recipe)]) == 0
    assert f"--trust {far[1]}" in refusal(capsys, ["evaluate", str(tmp_path / "run")])
    assert main(["evaluate", str(tmp_path / "run"), "--trust", far[1]]) == 0


def filled(cache: Path, root: Path, **changes: Any) -> str:
    """Precompute from images at a URL; returns the digest of the manifest."""
    dataset = {"kind": "image_folder", "root": f"file://{root}", "labelled": False}
    run(cache, dataset=dataset, teachers={"t": teacher()}, **changes)
    return digest_of(cache)


def test_a_manifest_of_ones_own_is_remembered_through_growth_and_derivation(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "images", {"a": 3, "b": 3})
    cache = tmp_path / "c.zarr"
    first = filled(cache, tmp_path / "images")
    assert main(["verify", str(cache)]) == 0
    assert (
        filled(cache, tmp_path / "images", views={"num_views": 3, "seed": 3, "augmentations": FLIP_AND_CROP}) != first
    )
    assert main(["verify", str(cache)]) == 0
    derive(
        DeriveRecipe.model_validate(
            {"cache": str(cache), "out": str(tmp_path / "d.zarr"), "teachers": {"t": {"keep": "all"}}}
        )
    )
    assert main(["verify", str(tmp_path / "d.zarr")]) == 0
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    for path in (cache, tmp_path / "d.zarr"):
        assert main(["verify", str(path)]) == 2
        assert main(["verify", str(path), "--trust", digest_of(path)]) == 0


def test_growing_or_deriving_from_a_strangers_cache_vouches_for_nothing(far: tuple[Path, str], tmp_path: Path) -> None:
    dataset = {"kind": "image_folder", "root": str(tmp_path / "images"), "labelled": False}
    run(
        far[0],
        dataset=dataset,
        teachers={"t": teacher()},
        views={"num_views": 3, "seed": 3, "augmentations": FLIP_AND_CROP},
    )
    entries = {"cache": str(far[0]), "out": str(tmp_path / "d.zarr"), "teachers": {"t": {"keep": "all"}}}
    derive(DeriveRecipe.model_validate(entries))
    for path in (far[0], tmp_path / "d.zarr"):
        assert digest_of(path) != far[1]
        assert main(["verify", str(path)]) == 2


SPOILT: dict[str, Callable[[Path], object]] = {
    "a folder that others may write to": lambda folder: folder.chmod(0o777),
    "a link in its place": lambda folder: (folder.rename(folder.with_name("x")), folder.symlink_to("x")),
    "a link as the note": lambda folder: [
        (n.rename(folder.parent / n.name), n.symlink_to(folder.parent / n.name)) for n in list(folder.iterdir())
    ],
    "a note that others may write to": lambda folder: [note.chmod(0o666) for note in folder.iterdir()],
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_memory_that_others_could_have_written_is_none(name: str, home: Path) -> None:
    digest = "ab" * 32
    trust.remember(digest)
    assert trust.is_granted(digest)
    SPOILT[name](home / "logitcache" / "written")
    assert not trust.is_granted(digest)


def test_nothing_is_remembered_without_a_home(home: Path) -> None:
    home.write_text("a file where the folder should be")
    trust.remember("ab" * 32)
    assert not trust.is_granted("ab" * 32)


class Bomb:
    """An object whose pickle makes a file when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("PWNED",)


@pytest.mark.parametrize("name", ["checkpoint", "hub"])
def test_a_teacher_that_only_a_manifest_names_is_not_built(
    name: str, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(Bomb(), cache / "w.pt")
    digest = from_elsewhere(cache, model=model(RISKY[name]).model_dump(mode="json"))
    recipe = student(cache, tmp_path / "run", validation={"cache": str(cache)})
    assert f"trust: {digest}" in refusal(capsys, ["train-student", str(recipe), "--online"])
    assert main(["train-student", str(recipe)]) == 0  # no teacher is in the loop
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run")]) == 0  # it weighs the student alone
    assert f"trust: {digest}" in capsys.readouterr().err
    assert not Path("PWNED").exists()


def test_a_granted_teacher_is_loaded_as_weights_alone(cache: Path) -> None:
    torch.save(Bomb(), cache / "w.pt")
    digest = from_elsewhere(cache, model=model(RISKY["checkpoint_path"]).model_dump(mode="json"))
    with pytest.raises(RecipeError, match="cannot be built"):
        live_targets(str(cache), "cpu", trust=[digest])
    assert not Path("PWNED").exists()


def test_code_is_opened_by_no_grant(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digest = from_elsewhere(cache, {"kind": "custom", "factory": "os:mkdir", "arguments": {"path": "PWNED"}})
    assert main(["verify", str(cache), "--trust", digest]) == 0
    assert "user's own code" in capsys.readouterr().out
    assert not Path("PWNED").exists()


def fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(1 << 40)


ENDLESS: dict[str, tuple[dict[str, Any], Callable[[Path], object]]] = {
    "a FIFO": ({"kind": "webdataset", "shards": "x.tar"}, lambda root: fifo(root / "x.tar")),
    "a link to a FIFO": (
        {"kind": "webdataset", "shards": "y.tar"},
        lambda root: (fifo(root / "x.tar"), (root / "y.tar").symlink_to("x.tar")),
    ),
    "/dev/zero": ({"kind": "webdataset", "shards": "/dev/zero"}, lambda root: None),
    "a hole": ({"kind": "webdataset", "shards": "x.tar"}, lambda root: sparse(root / "x.tar")),
    "a folder as shard": ({"kind": "webdataset", "shards": "images"}, lambda root: None),
    "a FIFO in the folder": ({"kind": "image_folder", "root": "images"}, lambda root: fifo(root / "images/a/000.png")),
    "a hole in the folder": (
        {"kind": "image_folder", "root": "images"},
        lambda root: sparse(root / "images/a/000.png"),
    ),
    "a root that is a FIFO": ({"kind": "image_folder", "root": "x"}, lambda root: fifo(root / "x")),
    "the root of the disk": ({"kind": "image_folder", "root": "/", "labelled": False}, lambda root: None),
    "idx": ({"kind": "torchvision", "name": "MNIST", "root": "."}, lambda root: idx(root)),
}


def idx(root: Path) -> None:
    (root / "MNIST/raw").mkdir(parents=True)
    sparse(root / "MNIST/raw/train-images-idx3-ubyte")
    fifo(root / "MNIST/raw/train-labels-idx1-ubyte")


def read(dataset: Dataset) -> None:
    opened = dataset.open(4) if isinstance(dataset, ImageFolder) else dataset.open()
    opened.digests()
    opened.sizes()


@pytest.mark.parametrize("name", ENDLESS)
def test_what_would_never_end_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "images", {"a": 2, "b": 2})
    entry, plant = ENDLESS[name]
    plant(tmp_path)
    dataset = DATASETS.validate_python(entry)
    assert dataset.risks() == ()
    began = time.thread_time()
    with pytest.raises(DataError):
        read(dataset)
    assert time.thread_time() - began < 2


PATTERNS = ["x-{0..999999999}.tar", "{0..99}" * 6, "{a,b,c}" * 40, f"{{{'0' * 1000}1..2}}.tar", ["{0..99999}"] * 3]


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: str(pattern)[:20])
def test_patterns_of_too_many_names_are_refused_before_they_are_written_down(
    pattern: Any, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    began = time.thread_time()
    with pytest.raises(ValueError, match=r"names or more|neither a range|named twice"):
        WebDataset(shards=tuple(pattern) if isinstance(pattern, list) else pattern)
    assert time.thread_time() - began < 1


def test_a_manifest_with_such_a_pattern_is_not_valid(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from_dataset = {"kind": "webdataset", "shards": PATTERNS[0]}
    forge(cache, lambda manifest: manifest.update(dataset=from_dataset))
    assert main(["verify", str(cache)]) == 3
    assert "names or more" in capsys.readouterr().err


def test_a_protocol_that_a_url_alone_does_not_open_says_so() -> None:
    with pytest.raises(RecipeError, match="ftp:// needs more than a URL states"):
        Remote("ftp://127.0.0.1/x").list()


def test_every_step_works_with_an_empty_home_and_another_one_for_the_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "images", {"a": 3, "b": 3})
    images = {"kind": "image_folder", "root": str(tmp_path / "images"), "labelled": False}
    monkeypatch.delenv("XDG_CACHE_HOME")
    cache = tmp_path / "c.zarr"
    for number, step in enumerate(
        [
            lambda: run(cache, dataset=images, teachers={"t": teacher()}),
            lambda: main(["verify", str(cache)]),
            lambda: main(["train-student", str(student(cache, tmp_path / "run", validation={"cache": str(cache)}))]),
            lambda: main(["evaluate", str(tmp_path / "run")]),
        ]
    ):
        monkeypatch.setenv("HOME", str(tmp_path / f"home{number}"))
        assert not step() or number == 0


def test_a_grant_opens_a_folder_of_timm(cache: Path, tmp_path: Path) -> None:
    from timm.models import save_for_hf

    save_for_hf(Timm(name="test_resnet", pretrained=False).build(3, 3).module, tmp_path / "t", safe_serialization=True)
    digest = from_elsewhere(cache, model={"kind": "timm", "name": f"local-dir:{tmp_path}/t"})
    with pytest.raises(RefusedError, match="local-dir"):
        live_targets(str(cache), "cpu")
    with pytest.raises(MismatchError, match=r"teachers\.t\.weights"):  # it was built, and is another network
        live_targets(str(cache), "cpu", trust=[digest])
