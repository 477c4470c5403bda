"""What a manifest may have opened: nothing that runs code, nothing elsewhere, but what the user vouches for."""

import json
import socket
import threading
from pathlib import Path
from typing import Any, get_args

import pytest
import torchvision.datasets
import yaml
from pydantic import TypeAdapter

from logitcache import trust
from logitcache.cache.snapshot import open_snapshot
from logitcache.cli import main
from logitcache.models import Model
from logitcache.views.datasets import Dataset
from tests.cache.made import forge, run, teacher, write_images

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


def from_elsewhere(cache: Path, dataset: dict[str, Any] | None = None, model: object = None) -> str:
    """Let a manifest name something else, as if it came from another machine; returns its digest."""

    def change(manifest: dict[str, Any]) -> None:
        if dataset is not None:
            manifest["dataset"] = {
                "kind": "image_folder",
                "mode": "RGB",
                "labelled": True,
                "decoder": "pillow",
                **dataset,
            }
            if dataset.get("kind") != "image_folder" and "kind" in dataset:
                manifest["dataset"] = dataset
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
    "checkpoint_path": {"kind": "timm", "name": "resnet18", "options": {"checkpoint_path": "c.zarr/w.pt"}},
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
