"""Measuring while training, against counts by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from logitcache.cache.cache import open_cache
from logitcache.errors import MismatchError, RecipeError
from logitcache.models import load_model
from logitcache.runtime import console
from logitcache.student.evaluation.evaluate import evaluate
from logitcache.student.training import train
from logitcache.views.datasets import Bundled, open_dataset
from tests.student.small import (
    DROPOUT,
    NUM_IMAGES,
    PARTLY,
    TEST_IMAGES,
    THREE,
    PartlyLabelled,
    fill,
    metrics,
    student,
    teacher,
    top1,
)


class Turned:
    """The test images, their classes from the last to the first."""

    def __init__(self) -> None:
        self.images = open_dataset(Bundled.model_validate(TEST_IMAGES))
        self.classes = self.images.class_names[::-1]  # type: ignore[index]

    def __len__(self) -> int:
        return len(self.images.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images.read(index), 9 - int(self.images.labels[index])


def test_classes_in_another_order_are_refused_with_the_map_that_brings_them_back(cache: Path, tmp_path: Path) -> None:
    images = {"dataset": {"kind": "custom", "factory": "tests.student.test_validation:Turned"}}
    with pytest.raises(MismatchError, match="in another order: class 0 is 'Ankle boot', the model's is 'T-shirt/top'"):
        train(student(tmp_path / "turned", cache, validation=images))
    result = train(student(tmp_path / "run", cache, epochs=1, validation={"dataset": TEST_IMAGES}))
    with pytest.raises(MismatchError, match="in another order") as refused:
        evaluate(tmp_path / "run", [f"validation={json.dumps(images)}"])
    class_map = json.loads(str(refused.value).partition("Fix: validation.class_map: ")[2])
    found = evaluate(tmp_path / "run", [f"validation={json.dumps(images | {'class_map': class_map})}"])
    assert found.measures.quality == result.top1


def test_the_kept_model_was_measured_without_dropout(cache: Path, tmp_path: Path) -> None:
    result = train(student(tmp_path / "run", cache, model=DROPOUT, validation={"dataset": TEST_IMAGES}))
    with pytest.raises(RecipeError, match="factory"):
        load_model(Path(result.out))
    assert result.top1 == pytest.approx(top1(tmp_path / "run", DROPOUT["factory"]))


def test_a_run_without_validation_has_no_accuracy(cache: Path, tmp_path: Path) -> None:
    result = train(student(tmp_path / "run", cache, epochs=1))
    assert (result.top1, result.top5, result.best_top1, result.agreement) == (None, None, None, None)


def _answers(run: Path, count: int = 100) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Log-probabilities of a run on the test images, and their labels, by another way."""
    images = open_dataset(Bundled(split="test", num_images=count))
    pixels = torch.stack([images.read(index) for index in range(count)]).float()
    with torch.no_grad():
        logits = load_model(run).module.eval()((pixels / 255 - 0.5) / 0.5).double()
    return torch.log_softmax(logits, dim=1).numpy(), images.labels


def test_validation_on_images_counts_the_best_and_the_five_best(cache: Path, tmp_path: Path) -> None:
    result = train(student(tmp_path / "run", cache, validation={"dataset": TEST_IMAGES, "batch_size": 30}))
    log_p, labels = _answers(tmp_path / "run")
    order = np.argsort(-log_p, axis=1)
    assert result.top1 == pytest.approx(np.mean(order[:, 0] == labels))
    assert result.top5 == pytest.approx(np.mean([y in five for y, five in zip(labels, order[:, :5], strict=True)]))
    assert result.agreement is None


def test_validation_on_a_cache_compares_with_the_teacher(cache: Path, untouched: Path, tmp_path: Path) -> None:
    result = train(student(tmp_path / "run", cache, validation={"cache": str(untouched), "batch_size": 30}))
    log_p, labels = _answers(tmp_path / "run")
    kept = open_cache(untouched)
    logits = kept.rows([(0, index) for index in range(100)])["net"].logits  # type: ignore[misc]
    log_t = torch.log_softmax(logits.double(), dim=1).numpy()
    row = metrics(tmp_path / "run")[-1]
    assert result.agreement == pytest.approx(np.mean(log_p.argmax(axis=1) == log_t.argmax(axis=1)))
    assert row["val_kl"] == pytest.approx(np.mean(np.sum(np.exp(log_t) * (log_t - log_p), axis=1)), rel=1e-5)
    assert row["val_teacher_top1"] == pytest.approx(np.mean(log_t.argmax(axis=1) == labels))
    assert row["val_top1"] == pytest.approx(np.mean(log_p.argmax(axis=1) == labels))


def test_accuracy_on_randomly_augmented_images_is_called_so(
    cache: Path, untouched: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    console.configure()
    views = {"augmentations": [{"kind": "resize", "size": 30}, {"kind": "center_crop", "size": 28}]}
    resized = fill(tmp_path / "resized", views=views, images=TEST_IMAGES)
    for number, measured in enumerate((cache, untouched, resized)):
        train(student(tmp_path / str(number), cache, validation={"cache": str(measured)}))
        said = f"{measured} holds randomly augmented images" in capfd.readouterr().err
        assert said == (measured == cache)
    console.configure(quiet=True)


def test_of_five_classes_or_fewer_all_are_among_the_five_best_and_top5_is_left_out(tmp_path: Path) -> None:
    result = train(teacher(tmp_path / "run", dataset=THREE, validation={"dataset": THREE}))
    assert result.top5 is None
    assert result.top1 is not None
    assert result.top1 < 1.0


def test_validation_of_partly_labelled_images_counts_those_with_a_label(cache: Path, tmp_path: Path) -> None:
    result = train(student(tmp_path / "run", cache, validation={"dataset": PARTLY}))
    images = PartlyLabelled()
    pixels = torch.stack([images[index][0] for index in range(0, NUM_IMAGES, 3)]).float()
    labels = torch.tensor([images[index][1] for index in range(0, NUM_IMAGES, 3)])
    with torch.no_grad():
        best = load_model(tmp_path / "run").module.eval()((pixels / 255 - 0.5) / 0.5).argmax(dim=1)
    assert result.top1 == pytest.approx((best == labels).float().mean().item())


def test_what_only_evaluation_uses_may_change_when_a_run_continues(cache: Path, tmp_path: Path) -> None:
    first = train(student(tmp_path / "run", cache, epochs=1, validation={"dataset": TEST_IMAGES}))
    other = {"dataset": TEST_IMAGES, "groups": {"head": 10, "tail": 5}, "taps": ["head"]}
    assert train(student(tmp_path / "run", cache, epochs=1, validation=other), resume=True) == first
    mapped = {"dataset": TEST_IMAGES, "class_map": {"Bag": 8}}
    with pytest.raises(MismatchError, match="class_map"):
        train(student(tmp_path / "run", cache, epochs=1, validation=mapped), resume=True)


def test_images_of_another_size_than_those_learned_from_are_measured_on_only_if_that_is_said(tmp_path: Path) -> None:
    learned = {"augmentations": [{"kind": "resize", "size": [20, 20]}]}
    with pytest.raises(RecipeError, match=r"are 28 × 28 pixels.*20 × 20\. Fix.*\{kind: resize, size: \[20, 20\]\}"):
        train(teacher(tmp_path / "run", **learned, validation={"dataset": TEST_IMAGES}))
    for name, augmentations in (("as_they_are", []), ("resized", learned["augmentations"])):
        said = {"dataset": TEST_IMAGES, "augmentations": augmentations}
        assert train(teacher(tmp_path / name, **learned, validation=said)).top1 is not None
    sized = {"mean": [0.5], "std": [0.5], "input_size": 20}  # the model resizes all images to its own size
    result = train(teacher(tmp_path / "own", **learned, validation={"dataset": TEST_IMAGES}, preprocessing=sized))
    assert result.top1 is not None


@pytest.mark.parametrize(("side", "warned"), [(16, True), (24, False)])
def test_sizes_that_are_very_different_are_warned_of(
    side: int, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    learned = {"augmentations": [{"kind": "resize", "size": [side, side]}]}
    train(teacher(tmp_path / "run", **learned, validation={"dataset": TEST_IMAGES, "augmentations": []}))
    assert (f"learns from {side} × {side} pixels and is measured on 28 × 28" in caplog.text) == warned


def test_groups_of_classes_have_none_in_common(cache: Path, tmp_path: Path) -> None:
    groups = {"head": 10, "tail": 12}
    with pytest.raises(ValueError, match="in common"):
        student(tmp_path / "run", cache, validation={"dataset": TEST_IMAGES, "groups": groups})
