"""Predict: images of any place in, the most probable classes out, by a run's own transform."""

import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from logitcache.errors import LogitCacheError
from logitcache.models import read_stored
from logitcache.runtime.console import track
from logitcache.runtime.device import autocast, own_randomness, resolve_device
from logitcache.store.remote.client import Remote, is_remote
from logitcache.store.safe_files import open_regular
from logitcache.student.evaluation.open_run import require_memory, stated_factory, unopened_recipe
from logitcache.student.losses import BinaryCrossEntropy, MultiLabelKL
from logitcache.student.runs.trained import MODES, Evaluation, EvaluationTransform, load_student, read_evaluation
from logitcache.student.speed import lay_out
from logitcache.student.training_recipes import TrainingRecipe
from logitcache.views.datasets.image_folder import LARGEST, ImageFolder
from logitcache.views.datasets.images.image_files import Orientation, decode, is_image
from logitcache.views.datasets.images.pixels import Mode


@dataclass(frozen=True)
class ClassScore:
    """A class, its probability and its logit; `name` is None if the run did not record the names."""

    label: int
    name: str | None
    probability: float
    logit: float


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of an image, best first; of an image that cannot be read there are none, but `error`.

    Probabilities sum to 1 over all classes (softmax); of a run that learnt images of any number of classes each class
    has its own (sigmoid).
    """

    image: str
    classes: tuple[ClassScore, ...] = ()
    error: str | None = None


class ImageSource(NamedTuple):
    """The name of an image, and what reads it: anything that `EvaluationTransform` takes."""

    name: str
    read: Callable[[], object]


@dataclass(frozen=True)
class Predictor:
    """A trained model, opened to predict: uint8 pixels [B, C, h, w] on the CPU in, logits [B, K] out.

    It computes on `device`, and `transform` brings images to it. `is_multi_label`: it learnt images of any number of
    classes. `orientation`: handling of the EXIF orientation.
    """

    name: str
    logits: Callable[[Tensor], Tensor]
    transform: EvaluationTransform
    class_names: tuple[str, ...] | None
    device: torch.device
    is_multi_label: bool
    orientation: Orientation

    @classmethod
    def open(
        cls,
        run: str | Path,
        overrides: Sequence[str] = (),
        orientation: Orientation | None = None,
        batch_size: int = 1,
    ) -> "Predictor":
        """Load a run for batches of a size; `overrides` change its recipe. Raises RecipeError."""
        run = Path(run)
        recipe = unopened_recipe(run, overrides)
        device = resolve_device(recipe.device)
        factory = stated_factory(run, read_stored(run / "model.json"), overrides)
        # A network draws its first weights, which are then replaced.
        with own_randomness(device, recipe.seed):
            student = load_student(run, factory=factory, factories=recipe.factories, trust=recipe.trust)
        model, transform = lay_out(student.classifier.to(device), recipe), student.preprocess
        require_memory(run, model, batch_size, device.type, "--batch-size ")

        def logits(pixels: Tensor) -> Tensor:
            with autocast(device, recipe.precision):
                found: Tensor = model(pixels.to(device))
            return found.float().cpu()

        turned = orientation or evaluated_orientation(recipe, read_evaluation(run))
        return cls(str(run), logits, transform, student.class_names, device, learns_several(recipe), turned)

    def sources(self, image: str | Path) -> Iterator[ImageSource]:
        """Yield the images of a file, a folder or a URL; if it cannot be listed, one whose reading fails."""
        name, mode = os.fspath(image), self._mode
        try:
            single = is_image(name) if is_remote(name) else not os.path.isdir(name)
            if single:
                yield ImageSource(name, partial(_read, name, mode, self.orientation))
                return
            folder = ImageFolder(root=name, mode=mode, labelled=False, orientation=self.orientation).open()
            for index, below in enumerate(folder.ids):
                yield ImageSource(f"{name.rstrip('/')}/{below}", partial(folder.read, index))
        except (LogitCacheError, OSError) as error:
            yield ImageSource(name, partial(_raise, error))

    def source(self, content: bytes, name: str) -> ImageSource:
        """Return the image of a file's content."""
        return ImageSource(name, lambda: decode(io.BytesIO(content), self._mode, name, self.orientation))

    @property
    def _mode(self) -> Mode:
        return MODES.get(self.transform.num_channels, "RGB")

    @torch.no_grad()
    def predict(self, images: Sequence[ImageSource], top: int = 5) -> tuple[Prediction, ...]:
        """Predict the `top` classes of a batch of images; one that cannot be read has `error` instead."""
        with ThreadPoolExecutor() as pool:
            pixels = list(pool.map(partial(_pixels, self.transform), images))
        shapes: dict[torch.Size, dict[int, Tensor]] = {}
        for row, image in enumerate(pixels):
            if isinstance(image, Tensor):
                shapes.setdefault(image.shape, {})[row] = image
        scores: dict[int, tuple[ClassScore, ...]] = {}
        for rows in shapes.values():
            logits = self.logits(torch.stack(list(rows.values())))
            scores |= zip(rows, _scored(logits, self.is_multi_label, top, self.class_names), strict=True)
        return tuple(
            Prediction(source.name, scores.get(row, ()), image if isinstance(image, str) else None)
            for row, (source, image) in enumerate(zip(images, pixels, strict=True))
        )


def learns_several(recipe: TrainingRecipe) -> bool:
    """Return whether a recipe's losses give each class a probability of its own."""
    return any(isinstance(loss, BinaryCrossEntropy | MultiLabelKL) for loss in recipe.losses)


def predict_images(
    predictor: Predictor, images: Sequence[str | Path], top: int = 5, batch_size: int = 32
) -> tuple[Prediction, ...]:
    """Predict the classes of images: files, folders with all that lies below, and URLs; in order.

    An image that cannot be read does not stop the others.
    """
    sources = [each for image in images for each in predictor.sources(image)]
    batches = [sources[start : start + batch_size] for start in range(0, len(sources), batch_size)]
    shown = track(batches, "predict", len(batches), "batches")
    return tuple(one for batch in shown for one in predictor.predict(batch, top))


def evaluated_orientation(recipe: TrainingRecipe, recorded: Evaluation | None) -> Orientation:
    """Return how the images that a run was measured on were turned; data sets of some kinds have no orientation."""
    if recorded is not None and recorded.orientation is not None:
        return recorded.orientation
    entry = None if recipe.validation is None else recipe.validation.dataset
    turned: Orientation = getattr(entry, "orientation", "ignore")
    return turned


def _raise(error: Exception) -> Tensor:
    raise error


def _read(name: str, mode: Mode, orientation: Orientation) -> Tensor:
    if is_remote(name):
        return decode(io.BytesIO(Remote(name).read(most=LARGEST)), mode, name, orientation)
    with open_regular(Path(name).expanduser()) as file:
        return decode(file, mode, name, orientation)


def _pixels(transform: EvaluationTransform, source: ImageSource) -> Tensor | str:
    """Read and transform an image; return why it cannot be, naming it."""
    try:
        return transform(source.read())
    except LogitCacheError as error:
        return str(error) if source.name in str(error) else f"image '{source.name}': {error}"
    except OSError as error:
        why = error.strerror or "there is no such file"
        return f"image '{source.name}' cannot be read: {why}.\n  Fix: name an image file, a folder or a URL."


def _scored(logits: Tensor, several: bool, top: int, names: tuple[str, ...] | None) -> Iterator[tuple[ClassScore, ...]]:
    """Yield the `top` most probable classes of each row of logits [B, K]."""
    probabilities = logits.sigmoid() if several else logits.softmax(dim=1)
    best = logits.argsort(dim=1, descending=True, stable=True)[:, :top]
    for row, labels in enumerate(best.tolist()):
        yield tuple(
            ClassScore(
                label,
                None if names is None else names[label],
                float(probabilities[row, label]),
                float(logits[row, label]),
            )
            for label in labels
        )


def predictions_text(predictions: Sequence[Prediction]) -> str:
    """Write a line for each image that was read: its classes, best first, with their probabilities."""
    read = [one for one in predictions if one.error is None]
    width = max((len(one.image) for one in read), default=0)
    lines = (
        (
            f"{one.image:{width}}",
            *(f"{c.label if c.name is None else c.name} {100 * c.probability:.1f} %" for c in one.classes),
        )
        for one in read
    )
    return "".join("  ".join(line) + "\n" for line in lines)
