"""Small recipes, networks and runs for the tests of training."""

import copy
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

from logitcache.config.recipe import Component
from logitcache.models import Classifier, Preprocessing, SmallCNN, load_model
from logitcache.stage_one.precompute import PrecomputeRecipe, precompute
from logitcache.student.learner import Learner
from logitcache.student.runs.run_result import RunResult
from logitcache.student.training_recipes import StudentRecipe, TeacherRecipe
from logitcache.views.datasets import Bundled, open_dataset

R = TypeVar("R", bound=Component)

NUM_IMAGES = 200
BATCH = 32
IMAGES = {"kind": "bundled", "split": "train", "num_images": NUM_IMAGES}
TEST_IMAGES = {"kind": "bundled", "split": "test", "num_images": 100}
AUGMENTATIONS = [{"kind": "random_crop", "size": 28, "padding": 2}, {"kind": "horizontal_flip"}]
TINY = {"kind": "small_cnn", "width": 4}
LINEAR = {"kind": "custom", "factory": "tests.student.small:linear"}
DROPOUT = {"kind": "custom", "factory": "tests.student.small:dropout"}
PARTLY = {"kind": "custom", "factory": "tests.student.small:partly_labelled"}
UNLABELLED = {"kind": "custom", "factory": "tests.student.small:Unlabelled"}
THREE = {"kind": "custom", "factory": "tests.student.small:ThreeClasses"}
GREY = Preprocessing(mean=(0.3,), std=(0.3,))
TIMINGS = ("seconds", "images_per_second")


def recipe(kind: type[R], **entries: Any) -> R:
    return kind.model_validate_json(json.dumps(entries))


def student(out: Path, cache: Path, **changes: Any) -> StudentRecipe:
    """A student of two epochs with a short last batch."""
    entries: dict[str, Any] = {"model": TINY, "epochs": 2, "batch_size": BATCH, "num_workers": 0, "device": "cpu"}
    return recipe(StudentRecipe, **(entries | {"out": str(out), "cache": str(cache)} | changes))


def teacher(out: Path, **changes: Any) -> TeacherRecipe:
    """A model on labels, of one epoch."""
    entries: dict[str, Any] = {"model": TINY, "dataset": IMAGES, "epochs": 1, "batch_size": BATCH}
    return recipe(TeacherRecipe, **(entries | {"out": str(out), "num_workers": 0, "device": "cpu"} | changes))


def network(seed: int = 1) -> nn.Module:
    """A fixed network with opinions that differ between images; each caller has its own."""
    return copy.deepcopy(_network(seed))


@functools.cache
def _network(seed: int) -> nn.Module:
    images = open_dataset(Bundled(num_images=NUM_IMAGES))
    pixels = torch.stack([images.read(index) for index in range(NUM_IMAGES)])
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        classifier = Classifier(SmallCNN(width=4).build(10, 1).module, GREY)
        nn.init.normal_(list(classifier.modules())[-1].weight, std=2.0)
        for _ in range(20):  # the statistics of its normalisation are those of the images
            classifier.train()(pixels)
    return classifier.module.eval()


def fill(
    path: Path,
    teachers: Mapping[str, nn.Module] | None = None,
    logits: Mapping[str, Any] | None = None,
    images: Mapping[str, Any] | object = IMAGES,
    features: Mapping[str, Any] | None = None,
    classes: Sequence[int] | None = None,
    **changes: Any,
) -> Path:
    """Fill a cache of augmented views; `images` are a recipe entry or a data set."""
    named = isinstance(images, Mapping)
    modules = teachers or {"net": network()}
    entry = {"preprocessing": GREY.model_dump(mode="json"), "logits": logits or {"kind": "dense", "dtype": "float32"}}
    entry |= {"features": features or {}, "classes": classes}
    entries = {
        "cache": str(path),
        "dataset": images if named else None,
        "views": {"num_views": 2, "seed": 3, "augmentations": AUGMENTATIONS},
        "teachers": dict.fromkeys(modules, entry),
        "num_workers": 0,
        "device": "cpu",
    }
    precompute(recipe(PrecomputeRecipe, **(entries | changes)), teachers=modules, dataset=None if named else images)
    return path


def linear(num_classes: int = 10, size: int = 28) -> nn.Module:
    """A factory: no batch normalisation, so that a batch is the sum of its parts."""
    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear((size // 4) ** 2, num_classes))


def flat() -> nn.Module:
    """A factory: the student of README's loop."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))


def dropout() -> nn.Module:
    """A factory: training draws from the global generator."""
    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(49, 20), nn.Dropout(0.5), nn.Linear(20, 10))


def weights(run: Path | RunResult) -> bytes:
    return Path(run.out if isinstance(run, RunResult) else run, "weights.safetensors").read_bytes()


def metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without what a clock says."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]


def top1(run: Path, factory: str | None = None) -> float:
    """The accuracy of a run on the test images, by another way."""
    images = open_dataset(Bundled.model_validate(TEST_IMAGES))
    pixels = torch.stack([images.read(index) for index in range(len(images.ids))])
    with torch.no_grad():
        best = load_model(run, factory).module.eval()((pixels / 255 - 0.5) / 0.5).argmax(dim=1)
    return float((best.numpy() == images.labels).mean())


@contextmanager
def recorded_losses() -> Iterator[list[list[float]]]:
    """List the loss terms of every micro-batch that is trained on."""
    terms: list[list[float]] = []
    add = Learner.add

    def spy(self: Learner, values: Tensor, rows: Tensor) -> None:
        terms.append(values.tolist())
        add(self, values, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "add", spy)
        yield terms


class PartlyLabelled:
    """Bundled images of which two in three lost their labels."""

    classes = Bundled().open().class_names

    def __init__(self, every: int = 3) -> None:
        self._images = open_dataset(Bundled(num_images=NUM_IMAGES))
        self._every = every

    def __len__(self) -> int:
        return NUM_IMAGES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        label = int(self._images.labels[index]) if index % self._every == 0 else -1
        return self._images.read(index), label


def partly_labelled() -> PartlyLabelled:
    return PartlyLabelled()


class Unlabelled(PartlyLabelled):
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._images.read(index), -1


class ThreeClasses(PartlyLabelled):
    classes = ("a", "b", "c")

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._images.read(index), int(self._images.labels[index]) % 3
