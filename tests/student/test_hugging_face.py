"""Training from the cache of a teacher of transformers is training with it, of a classifier and of zero-shot labels."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from logitcache.cache.cache import open_cache
from logitcache.cli.app import main
from logitcache.config.recipe import load_recipe
from logitcache.stage_one.precompute import PrecomputeRecipe, precompute
from logitcache.student.training import train
from logitcache.student.training_recipes import StudentRecipe
from logitcache.teacher.online import live_targets
from tests.models.hugging_face import write_classifier, write_clip, write_siglip
from tests.student.small import recorded_losses

IMAGES, BATCH, EPOCHS = 40, 4, 5
STEPS = 50
LABELS = ["cat", "dog", "fish"]


def write_images(folder: Path) -> None:
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(IMAGES):
        pixels = generator.integers(0, 256, (40, 36, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")


def write_cache(folder: Path, model: dict[str, Any], **teacher: Any) -> Path:
    """Answer 40 photographs without labels, twice."""
    write_images(folder / "images")
    entries = {
        "cache": str(folder / "c.zarr"),
        "dataset": {"kind": "image_folder", "root": str(folder / "images"), "labelled": False},
        "views": {"num_views": 2, "augmentations": [{"kind": "random_resized_crop", "size": 32}]},
        "teachers": {"t": {"model": {"kind": "transformers", "path": str(folder / "m"), **model}, **teacher}},
        "num_workers": 0,
        "device": "cpu",
    }
    precompute(load_recipe(entries, PrecomputeRecipe))
    return folder / "c.zarr"


def student(cache: Path, out: Path, **changes: Any) -> StudentRecipe:
    entries = {
        "cache": str(cache),
        "out": str(out),
        "model": {"kind": "small_cnn", "width": 2, "depth": 2},
        "losses": [{"kind": "kl_divergence", "temperature": 2.0}],
        "optimizer": {"kind": "sgd", "lr": 0.02},
        "epochs": EPOCHS,
        "batch_size": BATCH,
        "num_workers": 0,
        "device": "cpu",
        **changes,
    }
    return load_recipe(entries, StudentRecipe)


def require_parity(cache: Path, out: Path, **changes: Any) -> None:
    """Train from the cache and with the teacher rebuilt from its manifest: the same losses and weights."""
    with recorded_losses() as cached:
        offline = train(student(cache, out / "cached", **changes))
    with recorded_losses() as live:
        online = train(student(cache, out / "online", **changes), live=live_targets(str(cache), "cpu"))
    assert len(cached) == len(live) == STEPS
    assert (offline.teacher_passes, online.teacher_passes) == (0, STEPS * BATCH)
    assert np.abs(np.array(cached) - np.array(live)).max() <= 1e-6
    first, second = (load_file(Path(result.out, "weights.safetensors")) for result in (offline, online))
    assert max(float((first[name] - second[name]).abs().max()) for name in first) <= 1e-6


def test_fifty_steps_from_the_cache_of_a_classifier_are_fifty_steps_online(tmp_path: Path) -> None:
    write_classifier(tmp_path / "m")
    require_parity(write_cache(tmp_path, {}, logits={"kind": "dense", "dtype": "float32"}), tmp_path)


@pytest.mark.parametrize("write", [write_clip, write_siglip])
def test_fifty_steps_from_the_embeddings_of_a_zero_shot_teacher_are_fifty_steps_online(
    write: Any, tmp_path: Path
) -> None:
    write(tmp_path / "m")
    cache = write_cache(tmp_path, {"task": "zero_shot", "labels": LABELS}, logits={"kind": "head", "dtype": "float32"})
    opened = open_cache(cache)
    teacher = opened.manifest.teachers["t"]
    width = 8 if write is write_clip else 16
    assert teacher.num_classes == 3
    # The embedding is what lies there, a number for each of its dimensions: no logits.
    assert [stored.shape for stored in teacher.stored_features.values()] == [(width,)]
    head = opened.head("t")
    assert head is not None
    assert head[0].shape == (3, width)
    require_parity(cache, tmp_path)


def test_labels_of_a_zero_shot_teacher_are_in_the_order_of_the_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_clip(tmp_path / "m")
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32), {"cat": "red", "dog": "blue"}[name]).save(tmp_path / "images" / name / "0.png")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"{{cache: {tmp_path}/c.zarr, dataset: {{kind: image_folder, root: {tmp_path}/images}}, device: cpu, "
        "views: {augmentations: [{kind: center_crop, size: 32}]}, num_workers: 0, "
        f"teachers: {{t: {{model: {{kind: transformers, path: {tmp_path}/m, task: zero_shot, labels: [dog, cat]}}}}}}}}"
    )
    assert main(["plan", str(recipe)]) == 2
    error = capsys.readouterr().err
    assert "label 0 is 'dog', class 0 is 'cat'" in error
    assert 'labels: ["cat", "dog"]' in error
    fixed = "teachers.t.model.labels=[cat, dog]"
    assert main(["precompute", str(recipe), "--set", fixed, "--part", "1/2"]) == 0
    assert main(["precompute", str(recipe), "--set", fixed, "--part", "2/2"]) == 0
    assert main(["verify", str(tmp_path / "c.zarr")]) == 0


def test_a_teacher_of_a_folder_takes_a_grant_if_only_a_manifest_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_classifier(tmp_path / "m")
    cache = write_cache(tmp_path, {})
    identity = open_cache(cache).manifest.digest()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a stranger's"))
    recipe = tmp_path / "s.yaml"
    recipe.write_text(
        f"{{cache: {cache}, out: {tmp_path}/run, model: {{kind: small_cnn, width: 2}}, epochs: 1, num_workers: 0, "
        "device: cpu, losses: [{kind: kl_divergence}]}"
    )
    assert main(["train-student", str(recipe), "--online"]) == 2
    error = capsys.readouterr().err
    assert f"the model '{tmp_path}/m'" in error
    assert f"trust: {identity}" in error
    assert main(["train-student", str(recipe), "--online", "--set", f"trust={identity}"]) == 0


def test_a_student_of_transformers_is_trained_resumed_and_loaded(tmp_path: Path) -> None:
    write_classifier(tmp_path / "m")
    cache = write_cache(tmp_path, {})
    write_classifier(tmp_path / "s", num_labels=5)
    model = {"kind": "transformers", "path": str(tmp_path / "s"), "new_head": True}
    train(student(cache, tmp_path / "run", model=model, epochs=1))
    longer = train(student(cache, tmp_path / "run", model=model, epochs=2), resume=True)
    assert longer.epochs == 2
    (tmp_path / "s").rename(tmp_path / "gone")
    assert main(["predict", str(tmp_path / "run"), str(tmp_path / "images/00.png")]) == 0
