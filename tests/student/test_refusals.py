"""What training refuses before the first step, with the reason and the fix."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from logitcache.cache.cache import open_cache
from logitcache.cache.format.layout import layout_of
from logitcache.errors import CacheError, LogitCacheError, MismatchError, RecipeError
from logitcache.student.runs.run_directory import RunDirectory
from logitcache.student.training import train
from logitcache.student.training_recipes import StudentRecipe, TeacherRecipe
from logitcache.views.datasets import Bundled, open_dataset
from tests.student.small import (
    IMAGES,
    LINEAR,
    TEST_IMAGES,
    THREE,
    UNLABELLED,
    fill,
    recorded_losses,
    student,
    teacher,
    weights,
)

BOTH = [{"kind": "kl_divergence"}, {"kind": "cross_entropy", "weight": 0.5}]


def test_an_epoch_without_a_single_batch_is_refused(cache: Path, tmp_path: Path) -> None:
    recipe = student(tmp_path / "run", cache, batch_size=256, drop_last=True)
    _refused(recipe, RecipeError, "drop_last leaves no batch: 200 images", 2)


def _linear(num_classes: int) -> dict[str, Any]:
    return LINEAR | {"arguments": {"num_classes": num_classes}}


def _refused(recipe: StudentRecipe | TeacherRecipe, error: type[LogitCacheError], match: str, code: int) -> str:
    """Train, and be refused before anything is written or learnt."""
    with recorded_losses() as losses, pytest.raises(error, match=match) as refused:
        train(recipe)
    assert refused.value.exit_code == code
    assert losses == []
    assert not Path(recipe.out).exists()
    return str(refused.value)


def test_a_model_of_other_classes_is_refused(cache: Path, tmp_path: Path) -> None:
    recipe = student(tmp_path / "run", cache, model=_linear(7))
    _refused(recipe, MismatchError, "predicts 7 classes, what it learns from has 10. Fix", 4)


def test_images_that_a_model_cannot_take_are_refused_in_words(cache: Path, tmp_path: Path) -> None:
    model = LINEAR | {"arguments": {"size": 32}}
    _refused(student(tmp_path / "run", cache, model=model), RecipeError, r"cannot take the images, uint8 \[1, 28", 2)
    crop = {"dataset": TEST_IMAGES, "augmentations": [{"kind": "center_crop", "size": 20}]}
    recipe = student(tmp_path / "run", cache, model=LINEAR, validation=crop)
    _refused(recipe, RecipeError, r"cannot take the validation images, uint8 \[1, 20, 20\]", 2)


def test_two_trainings_never_share_a_directory(cache: Path, tmp_path: Path) -> None:
    with RunDirectory(str(tmp_path / "run")).held(), pytest.raises(RecipeError, match="another training writes"):
        train(student(tmp_path / "run", cache))
    assert train(student(tmp_path / "run", cache)).steps > 0


def test_images_that_have_moved_are_found_where_the_recipe_says(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    _write_folder(old)
    folder = {"kind": "image_folder", "mode": "L"}
    cache = fill(tmp_path / "cache", images=folder | {"root": str(old)}, views={"num_views": 1})
    there = train(student(tmp_path / "there", cache))
    old.rename(new)
    with pytest.raises(LogitCacheError, match="old"):
        train(student(tmp_path / "lost", cache))
    moved = train(student(tmp_path / "moved", cache, dataset=folder | {"root": str(new)}))
    assert weights(there) == weights(moved)
    image = next(new.rglob("*.png"))
    image.write_bytes(next(path for path in new.rglob("*.png") if path != image).read_bytes())
    recipe = student(tmp_path / "changed", cache, dataset=folder | {"root": str(new)})
    _refused(recipe, MismatchError, image.stem, 4)


def _write_folder(root: Path) -> None:
    images = open_dataset(Bundled(num_images=40))
    for index, label in enumerate(images.labels.tolist()):
        (root / f"class_{label}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(images.read(index)[0].numpy()).save(root / f"class_{label}" / f"{index:03d}.png")


def test_other_images_are_refused(cache: Path, tmp_path: Path) -> None:
    recipe = student(tmp_path / "run", cache, dataset=IMAGES | {"num_images": 100})
    _refused(recipe, MismatchError, "100", 4)


def test_a_loss_that_needs_every_logit_is_refused_on_a_top_k_cache(top_k: Path, tmp_path: Path) -> None:
    recipe = student(tmp_path / "run", top_k, losses=[{"kind": "kl_divergence"}, {"kind": "mean_squared_error"}])
    message = _refused(recipe, RecipeError, r"losses\.1 \(mean_squared_error\) needs raw logits", 2)
    assert str(top_k) in message
    assert "keeps top_k logits of 'net'" in message
    assert "precompute with teachers.net.logits: {kind: dense}" in message
    assert "losses.0" not in message


@pytest.mark.parametrize(
    ("teacher_name", "match"),
    [("frist", r"names teacher 'frist', the cache has \['first', 'second'\]"), (None, "names no teacher")],
)
def test_a_loss_of_an_unknown_teacher_is_refused(
    teacher_name: str | None, match: str, two_teachers: Path, tmp_path: Path
) -> None:
    losses = [{"kind": "kl_divergence", "teacher": teacher_name}]
    _refused(student(tmp_path / "run", two_teachers, losses=losses), RecipeError, match, 2)


def test_damage_counts_where_it_is_read(two_teachers: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(two_teachers, tmp_path / "c.zarr"))
    shard = next(path.glob("second.logits/c.0.0*"))
    shard.write_bytes(bytes(shard.stat().st_size))
    losses = [{"kind": "kl_divergence", "teacher": "second"}]
    _refused(student(tmp_path / "second", path, losses=losses), CacheError, "second.logits view 0", 3)
    recipes = [
        student(tmp_path / name, cache, losses=[{"kind": "kl_divergence", "teacher": "first"}], epochs=1)
        for name, cache in (("sound", two_teachers), ("damaged", path))
    ]
    sound, damaged = (train(recipe) for recipe in recipes)
    assert damaged.loss == sound.loss


def test_an_incomplete_cache_is_refused(caches: Path, tmp_path: Path) -> None:
    images = {"kind": "bundled", "num_images": 600}
    path = fill(caches / "incomplete", images=images, views={"num_views": 1}, shard_rows=512)
    layout = layout_of(open_cache(path).manifest)
    (path / layout.targets[0].record_file(list(layout.shards())[-1])).unlink()
    _refused(student(tmp_path / "run", path), CacheError, "incomplete: 1 of 2 shards", 3)


def test_cross_entropy_on_images_without_any_label_is_refused(tmp_path: Path, caches: Path) -> None:
    path = fill(caches / "unlabelled", images=UNLABELLED)
    recipe = student(tmp_path / "run", path, losses=BOTH, dataset=UNLABELLED)
    _refused(recipe, RecipeError, r"losses\.1 \(cross_entropy\) needs labels", 2)
    train(student(tmp_path / "run", path, dataset=UNLABELLED, epochs=1))


def test_a_cache_of_the_users_own_data_set_needs_it_said_again(partly: Path, tmp_path: Path) -> None:
    _refused(student(tmp_path / "run", partly), RecipeError, "never names code to run", 2)


def test_validation_on_other_classes_is_refused(cache: Path, tmp_path: Path) -> None:
    recipe = student(tmp_path / "run", cache, validation={"dataset": THREE})
    _refused(recipe, MismatchError, "validation: the images has 3 classes, the model 10", 4)


def test_labels_are_needed_to_train_a_teacher(tmp_path: Path) -> None:
    _refused(teacher(tmp_path / "run", dataset=UNLABELLED), RecipeError, "no labels to learn from", 2)


@pytest.mark.parametrize(
    "loss",
    [{"kind": "dist"}, {"kind": "multi_label_kl"}, {"kind": "kl_divergence", "standardize": True}],
    ids=lambda loss: loss["kind"],
)
def test_losses_of_raw_logits_are_refused_on_a_few(top_k: Path, tmp_path: Path, loss: dict[str, Any]) -> None:
    recipe = student(tmp_path / "run", top_k, losses=[loss])
    text = rf"losses.0 \({loss['kind']}\) needs raw logits, .*top_k.*precompute with teachers.net.logits"
    _refused(recipe, RecipeError, text, 2)


def test_a_loss_over_whole_batches_takes_no_parts_of_them(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\['dist'\] compare the rows of a whole batch.*leave out micro_batches"):
        student(tmp_path / "run", cache, losses=[{"kind": "dist"}], micro_batches=2)


def test_a_loss_that_compares_the_rows_of_a_batch_takes_no_batch_of_one(cache: Path, tmp_path: Path) -> None:
    coupled = [{"kind": kind, "student": "0", "feature": "f"} for kind in ("rkd", "cka", "pkt", "similarity")]
    with pytest.raises(ValueError, match=r"\['rkd', 'cka', 'pkt', 'similarity'\] compare.*make batch_size 3 or more"):
        student(tmp_path / "run", cache, losses=[*coupled, {"kind": "kl_divergence"}], batch_size=1)
    with pytest.raises(ValueError, match=r"\['rkd', 'cka'\] compare.*make batch_size 3 or more"):
        student(tmp_path / "run", cache, losses=coupled, batch_size=2)
    assert student(tmp_path / "run", cache, losses=[{"kind": "kl_divergence"}], batch_size=1).batch_size == 1


def test_a_last_batch_with_too_little_to_compare_is_refused(cache: Path, tmp_path: Path) -> None:
    """Of 200 images in batches of 199 one is left, in batches of 66 two, in batches of 197 three."""
    losses = [{"kind": "cross_entropy"}, {"kind": "dist"}]
    for batch_size, left in ((199, 1), (66, 2)):
        recipe = student(tmp_path / "run", cache, losses=losses, batch_size=batch_size)
        text = _refused(recipe, RecipeError, f"200 images in batches of {batch_size} leave a last batch of {left}", 2)
        assert "losses.1 (dist) takes 3 or more\n  Fix: drop_last: true, or another batch_size" in text
        assert "losses.0" not in text
    for number, changes in enumerate(({"batch_size": 197}, {"batch_size": 199, "drop_last": True})):
        assert train(student(tmp_path / f"{number}", cache, losses=losses, epochs=1, **changes)).steps == 2 - number
    alone = [{"kind": "cross_entropy"}]
    assert train(student(tmp_path / "alone", cache, losses=alone, batch_size=199, epochs=1)).steps == 2
