"""Photographs that are decoded at a part of their size, through every command that reads, makes or compares views."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from logitcache.cache.cache import open_cache
from logitcache.cli import main
from logitcache.models import SmallCNN
from logitcache.views.keys import ViewKey
from logitcache.views.spec import Views
from tests.cache.made import DENSE32, contents
from tests.objects import bucket
from tests.views.images import textured

NUM_IMAGES, CLASSES = 150, 3
CROP = {"kind": "random_resized_crop", "size": 16, "scale": [0.25, 1.0]}
HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}
TINY = {"kind": "small_cnn", "width": 4}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs of which most are reduced to a half, some to a quarter and some are PNG; a teacher; a cache."""
    folder = tmp_path_factory.mktemp("scaled")
    for number in range(NUM_IMAGES):
        pixels = textured(1, 84 + number, 170 - number % 70, seed=number)[0].permute(1, 2, 0).numpy()
        path = folder / f"photos/class{number % CLASSES}/{number:03}.{'png' if number % 10 == 0 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    torch.manual_seed(0)
    torch.save(SmallCNN(width=4).build(CLASSES, 3).module.state_dict(), folder / "weights.pt")
    model = {"kind": "checkpoint", "path": str(folder / "weights.pt"), "model": TINY, "num_classes": CLASSES}
    recipe: dict[str, Any] = {
        "cache": str(folder / "c.zarr"),
        "dataset": {"kind": "image_folder", "root": str(folder / "photos")},
        "views": {"num_views": 2, "decode": "scaled", "augmentations": [{"kind": "horizontal_flip"}, CROP]},
        "teachers": {"t": {"model": model, "preprocessing": HALF, "logits": DENSE32}},
        "shard_rows": 64,
        "row_checksums": True,
        "record_parameters": True,
        "batch_size": 32,
        "num_workers": 0,
        "device": "cpu",
    }
    student = {"cache": recipe["cache"], "out": str(folder / "run"), "model": TINY, "preprocessing": HALF, "epochs": 2}
    student |= {"batch_size": 50, "num_workers": 0, "device": "cpu", "schedule": {"final_lr": 1.0}}
    member = {"members": {"t": 1}, "logits": {"kind": "top_k", "k": 2}}
    derived = {"cache": recipe["cache"], "out": str(folder / "d.zarr"), "teachers": {"small": member}, "device": "cpu"}
    for name, entries in (("precompute", recipe), ("student", student), ("derive", derived)):
        (folder / f"{name}.yaml").write_text(json.dumps(entries))
    assert main(["precompute", str(folder / "precompute.yaml")]) == 0
    return folder


def run(capsys: pytest.CaptureFixture[str], command: str, *arguments: str, code: int = 0) -> Any:
    capsys.readouterr()
    assert main([command, *arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_the_manifest_and_the_canaries_record_it(made: Path) -> None:
    cache = open_cache(made / "c.zarr")
    stored = json.loads((made / "c.zarr/zarr.json").read_text())["attributes"]["logitcache"]["manifest"]["views"]
    assert stored["decode"] == "scaled"
    views = cache.views()
    factors = np.rint(views.dataset.sizes() / views.images.sizes())
    assert np.unique(factors, axis=0).tolist() == [[1, 1], [2, 2], [4, 4]]
    answered = cache.rows([ViewKey(1, 7)])["t"].logits
    network = torch.load(made / "weights.pt", weights_only=True)
    module = SmallCNN(width=4).build(CLASSES, 3).module.eval()
    module.load_state_dict(network)
    with torch.no_grad():
        again = module((views[ViewKey(1, 7)][None] / 255 - 0.5) / 0.5)
        full = Views(views.dataset, views.spec.model_copy(update={"decode": "full"}))[ViewKey(1, 7)]
    assert torch.allclose(answered, again, atol=1e-5)
    assert not torch.equal(full, views[ViewKey(1, 7)])


def test_parts_workers_and_several_views_of_a_decode_write_the_same_bytes(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, options, changes in (
        ("parts", ["--part", "1/2"], []),
        ("parts", ["--part", "2/2"], []),
        ("shared", [], ["views_per_image=2", "num_workers=2", "start_method=fork"]),
    ):
        sets = [word for change in [f"cache={tmp_path / name}", *changes] for word in ("--set", change)]
        run(capsys, "precompute", str(made / "precompute.yaml"), *options, *sets)
    assert contents(tmp_path / "parts") == contents(tmp_path / "shared") == contents(made / "c.zarr")


def test_a_lost_shard_is_repaired_and_further_views_are_added(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, cache = str(made / "precompute.yaml"), tmp_path / "c.zarr"
    run(capsys, "precompute", recipe, "--set", f"cache={cache}")
    whole = contents(cache)
    shard = cache / "t.logits" / "c.1.0.0"
    shard.write_bytes(bytes(len(shard.read_bytes())))
    run(capsys, "verify", str(cache), code=3)
    run(capsys, "verify", str(cache), "--repair", recipe)
    assert contents(cache) == whole
    grown = run(capsys, "precompute", recipe, "--set", f"cache={cache}", "--set", "views.num_views=3")
    assert grown["shards_written"] == 3
    refused = run(capsys, "precompute", recipe, "--set", f"cache={cache}", "--set", "views.decode=full", code=4)
    assert "views.decode: the cache has 'scaled', the recipe 'full'" in refused["error"]["message"]


def test_a_student_learns_what_it_would_beside_the_teacher_and_resumes(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = str(made / "student.yaml"), [f"out={tmp_path / name}" for name in ("cached", "online", "short")]
    cached = run(capsys, "train-student", recipe, "--set", out[0], "--set", "verify=strict")
    online = run(capsys, "train-student", recipe, "--set", out[1], "--online")
    assert online["teacher_passes"] > 0 == cached["teacher_passes"]
    assert online["loss"] == pytest.approx(cached["loss"], abs=1e-6)
    run(capsys, "train-student", recipe, "--set", out[2], "--set", "epochs=1")
    longer = run(capsys, "train-student", recipe, "--set", out[2], "--resume")
    assert longer["loss"] == cached["loss"]
    recorded = run(capsys, "train-student", recipe, "--set", f"out={tmp_path / 'r'}", "--set", "replay=recorded")
    assert recorded["loss"] == cached["loss"]


def test_verify_compares_plans_and_images_and_names_a_photograph_of_another_size(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, "verify", str(made / "c.zarr"))["problems"] == []
    photo = made / "photos/class1/001.jpg"
    kept = photo.read_bytes()
    Image.open(photo).reduce(2).save(photo)
    try:
        refused = run(capsys, "train-student", str(made / "student.yaml"), code=4)
    finally:
        photo.write_bytes(kept)
    assert "class1/001.jpg" in refused["error"]["message"]


def test_views_are_shown_materialized_derived_planned_and_reported(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    views = open_cache(made / "c.zarr").views()
    run(capsys, "inspect", str(made / "c.zarr"), "--view", "1/7", "--out", "view.png")
    assert Path("view.png").stat().st_size > 0
    for source in (made / "c.zarr", made / "precompute.yaml"):
        run(capsys, "materialize", str(source), f"out-{source.suffix}", "--format", "npz", "--num-workers", "0")
        pixels = np.concatenate(
            [np.load(file)["pixels"] for file in sorted(Path(f"out-{source.suffix}").glob("*.npz"))]
        )
        keys = [ViewKey(view, index) for view in range(2) for index in range(NUM_IMAGES)]
        assert np.array_equal(pixels, views.__getitems__(keys).numpy())
    run(capsys, "derive", str(made / "derive.yaml"), "--set", "out=d.zarr")
    derived = run(capsys, "train-student", str(made / "student.yaml"), "--set", "cache=d.zarr", "--set", "out=derived")
    assert derived["loss"] > 0
    planned = run(capsys, "plan", str(made / "precompute.yaml"), "--set", "cache=planned.zarr", "--batches", "1")
    assert planned["images"] == NUM_IMAGES, planned
    run(capsys, "report", str(made / "c.zarr"), "derived", "--measure", "0", "--out", "report.html")
    assert "views" in Path("report.html").read_text()


def test_images_and_caches_in_object_storage_are_the_same(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with bucket() as s3:
        for path in (made / "photos").rglob("*.*"):
            s3.put(f"photos/{path.relative_to(made / 'photos')}", path.read_bytes())
        options = ["--set", f"dataset.root={s3.url}/photos"]
        assert run(capsys, "verify", str(made / "c.zarr"), *options)["problems"] == []
        run(capsys, "precompute", str(made / "precompute.yaml"), *options, "--set", f"cache={s3.url}/c.zarr")
        there = open_cache(f"{s3.url}/c.zarr")
        keys = [ViewKey(view, index) for view in range(2) for index in range(NUM_IMAGES)]
        ours = open_cache(made / "c.zarr")
        assert torch.equal(there.rows(keys)["t"].logits, ours.rows(keys)["t"].logits)
        assert there.manifest.content_digest() == ours.manifest.content_digest()


def test_a_model_of_labels_takes_it_and_validation_decodes_in_full(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = {"kind": "image_folder", "root": str(made / "photos")}
    sized = [{"kind": "resize", "size": 20}, {"kind": "center_crop", "size": 16}]
    recipe = {"out": str(tmp_path / "run"), "dataset": images, "model": TINY, "preprocessing": HALF, "epochs": 1}
    recipe |= {"augmentations": [CROP], "batch_size": 50, "num_workers": 0, "device": "cpu"}
    recipe |= {"validation": {"dataset": images, "augmentations": sized}}
    losses = {}
    for decode in ("full", "scaled"):
        (tmp_path / "teacher.yaml").write_text(json.dumps(recipe | {"decode": decode, "out": str(tmp_path / decode)}))
        losses[decode] = run(capsys, "train-teacher", str(tmp_path / "teacher.yaml"))["loss"]
    assert losses["full"] != losses["scaled"]
