"""Students that are measured on images of their own cache: they learn nothing from these."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from logitcache.cache.cache import open_cache
from logitcache.errors import LogitCacheError, MismatchError, RecipeError
from logitcache.models import load_model
from logitcache.student.evaluation.evaluate import evaluate
from logitcache.student.training import train
from logitcache.views.datasets import Bundled, open_dataset
from logitcache.views.keys import ViewKey
from logitcache.views.order import held_out
from tests.student.small import NUM_IMAGES, TEST_IMAGES, Unlabelled, fill, metrics, student, teacher, weights
from tests.sweeps.small import alone, assert_same, run

SPLIT = {"split": 0.2}
HELD = held_out(NUM_IMAGES, SPLIT["split"])


class Inverted:
    """The bundled images, those that are held out inverted and of other classes."""

    classes = tuple("abcdefghij")

    def __init__(self) -> None:
        self.images = open_dataset(Bundled(num_images=NUM_IMAGES))

    def __len__(self) -> int:
        return NUM_IMAGES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pixels, label = self.images.read(index), int(self.images.labels[index])
        return (255 - pixels, 9 - label) if HELD[index] else (pixels, label)


def test_nothing_is_learned_from_images_that_are_held_out(cache: Path, tmp_path: Path) -> None:
    inverted = Inverted()
    fill(tmp_path / "inverted", images=inverted)
    losses = [{"kind": "kl_divergence"}, {"kind": "cross_entropy", "logit_adjustment": 1.0}]
    train(student(tmp_path / "one", cache, validation=SPLIT, losses=losses))
    train(student(tmp_path / "other", tmp_path / "inverted", validation=SPLIT, losses=losses), dataset=inverted)
    assert weights(tmp_path / "one") == weights(tmp_path / "other")
    assert metrics(tmp_path / "one") != metrics(tmp_path / "other")


@pytest.mark.parametrize("labelled", [True, False])
def test_it_is_measured_on_their_rows_of_view_0(labelled: bool, cache: Path, tmp_path: Path) -> None:
    images = None if labelled else Unlabelled()
    location = cache if labelled else fill(tmp_path / "cache", images=images)
    result = train(student(tmp_path / "run", location, validation=SPLIT), dataset=images)
    opened = open_cache(location)
    keys = [ViewKey(0, int(index)) for index in np.flatnonzero(HELD)]
    pixels = opened.views(images).__getitems__(keys)
    with torch.no_grad():
        answers = load_model(tmp_path / "run").module.eval()((pixels.float() / 255 - 0.5) / 0.5).argmax(1)
    taught = opened.rows(keys)["net"].logits.argmax(1)
    assert result.agreement == pytest.approx((answers == taught).double().mean().item())
    right = (answers.numpy() == opened.labels[HELD]).mean()
    assert result.top1 == (pytest.approx(right) if labelled else None)
    if labelled:
        evaluated = evaluate(tmp_path / "run")
        assert (evaluated.measures.top1, evaluated.measures.agreement) == (result.top1, result.agreement)
        assert evaluated.images == HELD.sum()


def test_students_of_a_sweep_share_what_they_hold_out_and_are_the_students_alone(cache: Path, tmp_path: Path) -> None:
    cells = {"a": {"validation": SPLIT}, "b": {"validation": SPLIT, "optimizer": {"kind": "sgd"}}}
    cells |= {"c": {"validation": {"split": 0.3}}, "all": {}}
    result = run(cache, tmp_path / "swept", cells=cells)
    rendered = [NUM_IMAGES - int(held_out(NUM_IMAGES, share).sum()) for share in (0.2, 0.3)] + [NUM_IMAGES]
    assert result.images_rendered == 2 * sum(rendered)
    for cell in ("b", "c"):
        alone(tmp_path / f"swept/runs/{cell},seed=0", tmp_path / cell)
        assert_same(tmp_path / f"swept/runs/{cell},seed=0", tmp_path / cell)


def test_a_run_goes_on_with_the_images_that_it_began_with(cache: Path, tmp_path: Path) -> None:
    train(student(tmp_path / "run", cache, validation=SPLIT))
    with pytest.raises(MismatchError, match=r"validation\.split: the run has 0\.2, the recipe 0\.3"):
        train(student(tmp_path / "run", cache, validation={"split": 0.3}, epochs=3), resume=True)
    longer = train(student(tmp_path / "run", cache, validation=SPLIT, epochs=3), resume=True)
    assert (longer.epochs, longer.images) == (3, 3 * (~HELD).sum())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation": SPLIT | {"dataset": TEST_IMAGES}}, "leave it out, or the other images"),
        ({"validation": SPLIT | {"augmentations": [{"kind": "resize", "size": 8}]}}, "brings its own augmentations"),
        ({"validation": {"split": 0.0001}}, "holds out 0 of 200 images"),
        ({"validation": {"split": 1.0}}, "less than 1"),
    ],
)
def test_shares_that_cannot_be_are_refused(
    changes: dict[str, object], message: str, cache: Path, tmp_path: Path
) -> None:
    with pytest.raises((LogitCacheError, ValueError), match=message):
        train(student(tmp_path / "run", cache, **changes))


def test_evaluate_counts_the_images_that_a_run_learnt_from(cache: Path, tmp_path: Path) -> None:
    train(student(tmp_path / "run", cache, epochs=1, validation={"split": 0.3}))
    learnt = open_cache(cache).labels[~held_out(200, 0.3)]
    expected = np.bincount(learnt, minlength=10).tolist()
    for overrides in ([], ["validation={dataset: {kind: bundled, split: test, num_images: 50}}"]):
        found = evaluate(tmp_path / "run", overrides)
        assert [one.training_images for one in found.per_class] == expected
    with pytest.raises(RecipeError, match=r"split 1e-09 holds out no image\. Fix"):
        evaluate(tmp_path / "run", ["validation.split=1e-9"])


def test_a_teacher_has_no_cache_to_hold_images_out_of(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"there is none\. Fix: validation\.dataset"):
        train(teacher(tmp_path / "run", validation=SPLIT))
