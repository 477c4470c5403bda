"""Students of a pairing: other images of the same things, in the teacher's views, with its answers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import logitcache as lc
from logitcache.cache.cache import open_cache
from logitcache.cli.app import main
from logitcache.config.recipe import dump_recipe, load_recipe
from logitcache.errors import MismatchError, RecipeError
from logitcache.report.page.report import write_report
from logitcache.store.mirrors_folder import FOLDER
from logitcache.student.evaluation.evaluate import evaluate
from logitcache.student.training import train
from logitcache.student.training_data import CachedData
from logitcache.student.training_recipes import StudentRecipe
from logitcache.sweeps.sweep import sweep
from logitcache.sweeps.sweep_recipe import SweepRecipe, as_sweep
from logitcache.teacher.online import live_targets
from logitcache.views.datasets import Bundled, open_dataset
from tests.cache.elsewhere import new_url, upload
from tests.student.ranks import train_together
from tests.student.small import (
    IMAGES,
    NUM_IMAGES,
    TEST_IMAGES,
    fill,
    metrics,
    network,
    recorded_losses,
    student,
    weights,
)

HALF = {"kind": "custom", "factory": "tests.student.test_paired_images:Half"}
HALF_TEST = HALF | {"arguments": {"split": "test", "num_images": 100}}
STEPS = {"batch_size": 20, "epochs": 5}  # 50 steps over 200 images
GEOMETRY = [
    {"kind": "random_resized_crop", "size": 16, "scale": [0.4, 1.0]},
    {"kind": "horizontal_flip"},
    {"kind": "color_jitter", "brightness": 0.5},
    {"kind": "random_erasing"},
]
MIXED = {
    "num_views": 2,
    "seed": 3,
    "augmentations": GEOMETRY,
    "mixing": [{"kind": "mixup", "p": 0.5}, {"kind": "cutmix", "p": 0.5}],
}


class Half:
    """Bundled images at half their size, in reverse order, without labels."""

    classes = Bundled().open().class_names

    def __init__(self, split: str = "train", num_images: int = NUM_IMAGES, lost: int = 0) -> None:
        self._images = Bundled(split=split, num_images=num_images).open()  # type: ignore[arg-type]
        self._rows = list(range(num_images - 1, lost - 1, -1))
        self.ids = [self._images.ids[row] for row in self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self._images.read(self._rows[index])
        return torch.nn.functional.avg_pool2d(image.float(), 2).round().to(torch.uint8), -1


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cache of 28 × 28 pixels, one of the test images, and their pairings at half that size."""
    folder = tmp_path_factory.mktemp("paired")
    fill(folder / "c.zarr")
    fill(folder / "test.zarr", images=TEST_IMAGES, views={})
    lc.pair(folder / "c.zarr", folder / "half", Half())
    lc.pair(folder / "test.zarr", folder / "half-test", Half("test", 100))
    return folder


def paired(out: Path, made: Path, **changes: Any) -> StudentRecipe:
    cache = changes.pop("cache", made / "c.zarr")
    return student(out, cache, **({"pairing": str(made / "half"), "dataset": HALF} | changes))


CROPPED = MIXED | {"augmentations": [{"kind": "random_crop", "size": 16}, {"kind": "horizontal_flip"}], "mixing": []}


@pytest.mark.parametrize("views", [CROPPED, MIXED], ids=["crops", "mixed"])
def test_fifty_steps_of_a_pairing_are_fifty_steps_online(views: Any, tmp_path: Path) -> None:
    """The live teacher sees its own images in the views of the student's."""
    fill(tmp_path / "c.zarr", views=views)
    lc.pair(tmp_path / "c.zarr", tmp_path / "half", Half())
    changes = {"losses": [{"kind": "kl_divergence", "temperature": 2.0}, {"kind": "cross_entropy"}], **STEPS}
    with recorded_losses() as cached:
        offline = train(paired(tmp_path / "cached", tmp_path, **changes))
    live = live_targets(str(tmp_path / "c.zarr"), "cpu", modules={"net": network()})
    with recorded_losses() as online:
        alive = train(paired(tmp_path / "online", tmp_path, **changes), live=live)
    assert (offline.teacher_passes, alive.teacher_passes) == (0, 5 * NUM_IMAGES)
    assert len(cached) == len(online) == 50
    assert np.abs(np.array(cached) - np.array(online)).max() <= 1e-6
    a, b = (load_file(Path(result.out, "weights.safetensors")) for result in (offline, alive))
    assert max(float((a[name] - b[name]).abs().max()) for name in a) <= 1e-6


def test_a_student_sees_its_own_images_beside_the_answers_to_the_teachers(made: Path, tmp_path: Path) -> None:
    recipe = paired(tmp_path / "run", made)
    data = CachedData.open(recipe, recipe.dataset, None, {})
    assert data.lesson(recipe).image_shape == (1, 14, 14)
    cache, bundled = open_cache(made / "c.zarr"), open_dataset(Bundled(num_images=NUM_IMAGES))
    seen = cache.views()
    for batch in data.stream([recipe]).batches(torch.device("cpu"), 1):
        keys = [tuple(key) for key in batch.keys.tolist()]
        assert torch.equal(batch.labels, torch.from_numpy(bundled.labels[[index for _, index in keys]]))
        own = torch.nn.functional.avg_pool2d(seen.__getitems__(keys).float(), 2)
        # Crops are shifted by half a pixel at most.
        alike, others = (
            [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(own, images.float(), strict=True)]
            for images in (batch.images, batch.images.roll(1, dims=0))
        )
        assert np.median(alike) > 0.9
        assert min(alike) > np.median(others)
        (targets,) = batch.teachers.values()
        assert torch.equal(targets.logits, cache.rows(keys)["net"].logits)  # type: ignore[arg-type]


def test_a_run_resumes_bit_by_bit_from_images_that_moved_and_on_no_other_pairing(made: Path, tmp_path: Path) -> None:
    parts, changes = tmp_path / "parts", {"epochs": 2}
    train(paired(parts, made, epochs=1))
    shuffled = paired(parts, made, shuffled=True, **changes)
    with pytest.raises(MismatchError, match="shuffled: the run has False, the recipe True"):
        train(shuffled, resume=True)
    with pytest.raises(MismatchError):
        train(paired(parts, made, pairing=None, dataset=None, **changes), resume=True)
    lc.pair(made / "c.zarr", tmp_path / "wide", Half(), size=20)
    with pytest.raises(MismatchError, match="pairing"):
        train(paired(parts, made, pairing=str(tmp_path / "wide"), **changes), resume=True)
    (tmp_path / "moved").mkdir()
    for file in (made / "half").iterdir():
        (tmp_path / "moved" / file.name).write_bytes(file.read_bytes())
    resumed = train(paired(parts, made, pairing=str(tmp_path / "moved"), **changes), resume=True)
    assert resumed.epochs == 2
    again = train(paired(tmp_path / "again", made, epochs=1))
    assert train(paired(tmp_path / "again", made, **changes), resume=True).loss == resumed.loss
    assert weights(parts) == weights(Path(again.out))
    learns_from = json.loads((parts / "environment.json").read_text())["learns_from"]
    assert (
        learns_from["pairing"]
        == json.loads((tmp_path / "again/environment.json").read_text())["learns_from"]["pairing"]
    )


def test_a_control_run_learns_from_the_answers_to_other_images(made: Path, tmp_path: Path) -> None:
    recipe = paired(tmp_path / "run", made, shuffled=True)
    stream = CachedData.open(recipe, recipe.dataset, None, {}).stream([recipe])
    plain = CachedData.open(recipe.model_copy(update={"shuffled": False}), recipe.dataset, None, {}).stream([recipe])
    bundled = open_dataset(Bundled(num_images=NUM_IMAGES))
    first, second = (next(one.batches(torch.device("cpu"), 0)) for one in (stream, plain))
    assert torch.equal(first.keys, second.keys)
    assert torch.equal(first.teachers["net"].logits, second.teachers["net"].logits)
    assert not (first.images == second.images).all(dim=(1, 2, 3)).any()
    sources = open_cache(made / "c.zarr").pairing(made / "half", shuffled=True).sources
    assert torch.equal(first.labels, torch.from_numpy(bundled.labels[sources[first.keys[:, 1].numpy()]]))
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(paired(tmp_path / "flag", made, epochs=1)))
    assert main(["train-student", str(file), "--shuffled", "-q"]) == 0
    assert json.loads((tmp_path / "flag/environment.json").read_text())["learns_from"]["shuffled"] is True
    assert metrics(tmp_path / "flag") != metrics(Path(train(paired(tmp_path / "true", made, epochs=1)).out))


def test_validation_is_on_the_students_images(made: Path, tmp_path: Path) -> None:
    on_dataset = train(
        paired(tmp_path / "dataset", made, validation={"dataset": HALF_TEST, "augmentations": []}, epochs=1)
    )
    assert on_dataset.top1 is None  # these have no labels
    both = {"cache": str(made / "test.zarr"), "pairing": str(made / "half-test"), "dataset": HALF_TEST}
    on_cache = train(paired(tmp_path / "cache", made, validation=both, epochs=1))
    assert on_cache.top1 is not None  # the labels are the cache's
    assert on_cache.agreement is not None
    overrides = [
        f"validation.dataset.factory={HALF['factory']}",
        "validation.dataset.arguments={split: test, num_images: 100}",
    ]
    found = evaluate(tmp_path / "cache", overrides)
    assert found.measures.quality == on_cache.top1
    split = train(paired(tmp_path / "split", made, validation={"split": 0.2}, epochs=1))
    assert split.images < NUM_IMAGES
    assert split.agreement is not None


def test_a_report_compares_a_student_on_its_images_with_the_teacher_on_its_own(made: Path, tmp_path: Path) -> None:
    """Also one that was measured on images without labels, of which no accuracy is drawn."""
    validation = {"dataset": HALF_TEST, "augmentations": []}
    train(paired(tmp_path / "run", made, validation=validation, epochs=1))
    stated, page = [f"validation.dataset.factory={HALF['factory']}"], tmp_path / "report.html"
    assert write_report([tmp_path / "run"], page, stated, points=20).measured == ("run",)
    assert "learnt from images of code, and what a file names is never called" in page.read_text()
    write_report([tmp_path / "run"], page, [*stated, f"dataset.factory={HALF['factory']}"], points=20)
    assert "not compared with its teachers" not in page.read_text()


def test_validation_on_the_teachers_images_is_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"of images that the teacher saw.*Fix: validation\.pairing"):
        train(paired(tmp_path / "run", made, validation={"cache": str(made / "test.zarr")}))
    wrong = {"cache": str(made / "test.zarr"), "pairing": str(made / "half")}
    with pytest.raises(MismatchError, match="another cache"):
        train(paired(tmp_path / "run", made, validation=wrong))
    with pytest.raises(ValueError, match="a pairing is of a cache"):
        paired(tmp_path / "run", made, validation={"dataset": TEST_IMAGES, "pairing": "p"})


@pytest.mark.parametrize("key", ["shuffled", "teacher_dataset"])
def test_what_is_for_a_pairing_alone_has_no_effect_without_one(key: str, made: Path, tmp_path: Path) -> None:
    value = {"shuffled": True, "teacher_dataset": IMAGES}[key]
    with pytest.raises(RecipeError, match=rf"has {key}, which is for a pairing\. Fix: "):
        train(student(tmp_path / "run", made / "c.zarr", **{key: value}))


def test_images_without_a_pair_are_left_out(made: Path, tmp_path: Path) -> None:
    fewer = HALF | {"arguments": {"lost": 30}}
    lc.pair(made / "c.zarr", tmp_path / "fewer", Half(lost=30), allow_unmatched=True)
    changes = {"pairing": str(tmp_path / "fewer"), "dataset": fewer, "epochs": 1}
    assert train(paired(tmp_path / "run", made, **changes)).images == NUM_IMAGES - 30
    held = paired(tmp_path / "held", made, validation={"split": 0.2}, **changes)
    assert train(held).images < NUM_IMAGES - 30
    changes["losses"] = [{"kind": "crd", "student": "0", "feature": "x"}]
    with pytest.raises(RecipeError, match=r"remember every image, left out or not\. Fix: pairs of all images"):
        train(paired(tmp_path / "crd", made, **changes))


def test_the_images_of_the_teacher_may_have_moved_too(made: Path, tmp_path: Path) -> None:
    live = live_targets(str(made / "c.zarr"), "cpu", modules={"net": network()})
    other = IMAGES | {"num_images": 100}
    with pytest.raises(MismatchError, match="was made from other images"):
        train(paired(tmp_path / "run", made, teacher_dataset=other), live=live)
    assert (
        train(paired(tmp_path / "run", made, teacher_dataset=IMAGES, epochs=1), live=live).teacher_passes == NUM_IMAGES
    )


def test_a_cache_at_a_url_is_paired_as_one_here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path / "mirrors"))
    url = new_url()
    upload(made / "c.zarr", url)
    lc.pair(url, tmp_path / "half", Half())
    for file in (made / "half").iterdir():
        assert (tmp_path / "half" / file.name).read_bytes() == file.read_bytes()
    here = train(paired(tmp_path / "here", made, epochs=1))
    there = train(paired(tmp_path / "there", made, cache=url, pairing=str(tmp_path / "half"), epochs=1))
    assert weights(here) == weights(there)


def test_ranks_see_parts_of_the_same_batches(made: Path) -> None:
    cache = open_cache(made / "c.zarr")
    pairing = cache.pairing(made / "half")
    whole, *parts = (
        cache.loader(32, dataset=Half(), pairing=pairing, rank=rank, world_size=size)
        for rank, size in ((0, 1), (0, 2), (1, 2))
    )
    for batch, first, second in zip(whole.epoch(0), *(part.epoch(0) for part in parts), strict=True):
        assert torch.equal(torch.cat([first.images, second.images]), batch.images)


def linear() -> nn.Module:
    """A factory: no batch normalisation, so that a batch is the sum of its parts."""
    return nn.Sequential(nn.Flatten(), nn.Linear(14 * 14, 10))


def test_ranks_learn_from_a_pairing_what_one_process_learns(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    bare = {"model": {"kind": "custom", "factory": f"{__name__}:linear"}, "epochs": 1}
    train(paired(tmp_path / "whole", made, **bare))
    assert train_together(2, paired(tmp_path / "parts", made, **bare)) == [(0, "")] * 2
    found, wanted = (load_file(tmp_path / name / "weights.safetensors") for name in ("parts", "whole"))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_a_sweep_shares_batches_among_students_of_one_pairing(made: Path, tmp_path: Path) -> None:
    entries = as_sweep(paired(tmp_path / "unused", made, epochs=1), grid={"shuffled": [False, True]})
    result = sweep(load_recipe(entries, SweepRecipe), tmp_path / "s")
    assert result.failed == {}
    runs = sorted(path.parent for path in (tmp_path / "s").rglob("metrics.jsonl"))
    assert len(runs) == 2
    alone = metrics(Path(train(paired(tmp_path / "alone", made, epochs=1)).out))
    assert [metrics(run) == alone for run in runs].count(True) == 1
