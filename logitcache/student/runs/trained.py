"""A trained model to use: pixels in, logits out, with its evaluation's transform and the names of its classes."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, cast

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor, nn

from logitcache.config.mistakes import first_mistake
from logitcache.config.recipe import Component, Count
from logitcache.errors import DataError, RecipeError
from logitcache.models import Classifier, load_into, load_model, resolve_preprocessing
from logitcache.store.files import write_atomically
from logitcache.store.safe_files import read_bounded
from logitcache.views.augmentations import Augmentation
from logitcache.views.augmentations.crops import CenterCrop
from logitcache.views.augmentations.foreign import factories_of
from logitcache.views.augmentations.resize import Resize
from logitcache.views.datasets.images.image_files import Orientation
from logitcache.views.datasets.images.pixels import Mode, from_value
from logitcache.views.keys import ViewKey
from logitcache.views.spec import ViewSpec

_FILE = "evaluation.json"
_MAX_BYTES = 16 << 20
MODES: dict[int, Mode] = {1: "L", 3: "RGB"}
_AUGMENTATIONS: TypeAdapter[tuple[Augmentation, ...]] = TypeAdapter(tuple[Augmentation, ...])


class Evaluation(Component):
    """The content of a run's `evaluation.json`: how images reach the model outside training, and what it predicts.

    `epoch` counts from 1: the kept weights are those after it. `orientation` is the handling of the EXIF orientation of
    the images that were measured, or without any of those that were learned from; None in runs of earlier releases.
    """

    augmentations: Annotated[tuple[Augmentation, ...], Field(max_length=64)]
    class_names: tuple[str, ...] | None = None
    epoch: Count
    orientation: Orientation | None = None


@dataclass(frozen=True)
class EvaluationTransform:
    """Bring an image to the pixels that a model was evaluated on; picklable, for data sets and loader workers."""

    augmentations: tuple[Augmentation, ...]
    num_channels: int

    def __call__(self, image: object) -> Tensor:
        """Return uint8 [C, h, w] of a PIL image, a uint8 tensor [C, H, W] or a uint8 array [H, W, C].

        Raises DataError for anything else.
        """
        try:
            pixels = from_value(image, MODES.get(self.num_channels))
        except ValueError as error:
            raise DataError(f"the image cannot be read: {error}") from error
        spec = ViewSpec(augmentations=self.augmentations)
        plans, _ = spec.plan([ViewKey(0, 0)], np.array([pixels.shape[1:]], dtype=np.int64))
        return spec.render([pixels], plans)[0][1][0].contiguous()


class Student(nn.Module):
    """A trained model in evaluation mode: uint8 pixels [B, C, H, W] in, logits [B, K] out; it normalises itself.

    `class_names` and `epoch`, counted from 1, are None for runs that did not record them.
    """

    def __init__(
        self,
        classifier: Classifier,
        transform: EvaluationTransform | None,
        class_names: tuple[str, ...] | None,
        epoch: int | None,
        run: str,
    ) -> None:
        super().__init__()
        self.classifier = classifier
        self.class_names, self.epoch, self.run = class_names, epoch, run
        self._transform = transform

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalise and predict."""
        return cast(Tensor, self.classifier(pixels))

    @property
    def preprocess(self) -> EvaluationTransform:
        """The transform of the run's evaluation: an image in, uint8 [C, h, w] out. Raises RecipeError if unrecorded."""
        if self._transform is None:
            raise RecipeError(
                f"{self.run} did not record how its images were evaluated (trained by an earlier release).\n"
                '  Fix: load_student(run, augmentations=[{"kind": "resize", "size": 224}, {"kind": "center_crop", '
                '"size": 224}]), with the size that it was trained on'
            )
        return self._transform


def load_student(
    run: str | Path,
    *,
    model: nn.Module | None = None,
    augmentations: Sequence[object] | None = None,
    factory: str | None = None,
    factories: Collection[str] = (),
    trust: Collection[str] = (),
) -> Student:
    """Load a finished run as a module on the CPU, in evaluation mode.

    `model` is the caller's own module, into which the weights are loaded in place; a run that trained a passed module
    needs it, or `factory`. `augmentations`, as recipe entries, replace those that the run recorded. `factory` names a
    function that builds the model, and `factories` those that augmentations may call: functions named only in a file
    are never called. `trust` has the digests of runs that may name models beyond the allow-list. Raises RecipeError.
    """
    run = Path(run).expanduser()
    network = model.module if isinstance(model, Classifier) else model
    built = load_model(run, factory, trust) if network is None else load_into(run, network)
    preprocessing = resolve_preprocessing(built, None, who=str(run))
    recorded = read_evaluation(run)
    chosen = None if recorded is None else recorded.augmentations
    if augmentations is not None:
        try:
            chosen = _AUGMENTATIONS.validate_python(list(augmentations))
        except ValidationError as error:
            raise RecipeError(f"augmentations: {error.errors()[0]['msg']}. Fix: list recipe entries") from error
    elif unstated := [name for name in factories_of(chosen or ()) if name not in factories]:
        raise RecipeError(
            f"{run / _FILE} names the factory '{unstated[0]}', and what a file names is never called.\n"
            f'  Fix: if you trust it, load_student(run, factories=["{unstated[0]}"])'
        )
    transform = None if chosen is None else EvaluationTransform(chosen, len(preprocessing.mean))
    names, epoch = (None, None) if recorded is None else (recorded.class_names, recorded.epoch)
    return Student(Classifier(built.module, preprocessing), transform, names, epoch, str(run)).eval()


def save_evaluation(run: Path, evaluation: Evaluation) -> None:
    """Write `evaluation.json` into a run directory."""
    write_atomically(run / _FILE, evaluation.model_dump_json(indent=2).encode() + b"\n")


def read_evaluation(run: Path) -> Evaluation | None:
    """Read `evaluation.json`; None if the run did not record it. Raises RecipeError for a damaged one."""
    path = run / _FILE
    try:
        return Evaluation.model_validate_json(read_bounded(path, _MAX_BYTES))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = first_mistake(error) if isinstance(error, ValidationError) else error
        raise RecipeError(f"{path} cannot be read: {reason}.\n  Fix: train again, or copy the run again.") from error


def evaluated_as(augmentations: tuple[Augmentation, ...], size: tuple[int, int]) -> tuple[Augmentation, ...]:
    """Return the validation's augmentations; without any, a resize and a centre crop to (height, width)."""
    return augmentations or (Resize(size=max(size)), CenterCrop(size=size))
