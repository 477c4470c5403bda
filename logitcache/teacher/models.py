"""`Teacher`: a frozen model that owns its normalisation; uint8 pixels in, `Targets` out."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from logitcache.cache.encodings import Dense, Encoding
from logitcache.device import Precision, autocast, own_randomness
from logitcache.errors import DataError, RecipeError
from logitcache.models import BuiltModel, Checkpoint, Classifier, Model, Preprocessing, resolve_preprocessing
from logitcache.recipe import Component
from logitcache.targets import Targets


class TeacherSource(Component):
    """A teacher and what to keep of its answers.

    `preprocessing` is needed where the model brings none of its own. `model` may be left out where the module itself
    is given.
    """

    model: Model | None = None
    preprocessing: Preprocessing | None = None
    precision: Precision = "float32"
    logits: Encoding = Dense()


class Teacher(nn.Module):
    """A classifier in evaluation mode, without gradients."""

    def __init__(self, name: str, classifier: Classifier, precision: Precision, device: torch.device) -> None:
        super().__init__()
        self.name, self.precision, self.device = name, precision, device
        self.classifier = classifier.to(device).eval()

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Targets:
        """Answer uint8 pixels [B, C, H, W] on the teacher's device: logits float32 [B, K]."""
        with autocast(self.device, self.precision):
            logits = self.classifier(pixels)
        if len(logits) != len(pixels):
            raise RecipeError(f"teacher {self.name!r} returns {len(logits)} rows of logits for {len(pixels)} images")
        return Targets(logits.float())


def build_teacher(
    name: str,
    source: TeacherSource,
    module: nn.Module | None,
    num_classes: int | None,
    in_channels: int,
    device: torch.device,
) -> Teacher:
    """Build a teacher from its recipe entry, or around the caller's own `module`.

    `num_classes` is for weights in a file, which do not say for how many they are; other models know it.
    """
    if module is not None:
        built = BuiltModel(module, None)
    elif source.model is not None:
        with own_randomness(device, 0):  # random weights, if that is what is asked for, are the same in every run
            built = source.model.build(num_classes if isinstance(source.model, Checkpoint) else None, in_channels)
    else:
        raise RecipeError(f"teachers.{name} names no model. Fix: give `model:`, or pass the module itself")
    chosen = resolve_preprocessing(built, source.preprocessing, who=f"teachers.{name}")
    return Teacher(name, Classifier(built.module, chosen), source.precision, device)


def require_answers(teacher: Teacher, logits: Tensor, num_classes: int, ids: Sequence[str]) -> None:
    """Raise where logits are not finite or not [B, num_classes], naming the image."""
    if logits.shape[1] != num_classes:
        raise RecipeError(
            f"teacher {teacher.name!r} returns {logits.shape[1]} logits for image {ids[0]!r}, and {num_classes} before."
            "\n  Fix: give every image as many"
        )
    row = first_not_finite(logits)
    if row is not None:
        raise DataError(
            f"teacher {teacher.name!r} answers image {ids[row]!r} with inf or nan.\n"
            + (
                "  Fix: mend the teacher"
                if teacher.precision == "float32"
                else f"  Fix: teachers.{teacher.name}.precision: float32, where it overflows in {teacher.precision}"
            )
        )


def require_fits(teacher: Teacher, encoded: dict[str, Tensor], ids: Sequence[str]) -> None:
    """Raise DataError naming the first image whose finite answer does not fit the stored dtype."""
    for suffix, values in encoded.items():
        row = first_not_finite(values)
        if row is not None:
            raise DataError(
                f"teacher {teacher.name!r}: {suffix or 'a logit'} of image {ids[row]!r} does not fit {values.dtype}, "
                f"whose largest number is {torch.finfo(values.dtype).max:.6g}.\n"
                f"  Fix: teachers.{teacher.name}.logits: {{kind: dense, dtype: float32}}"
            )


def first_not_finite(values: Tensor) -> int | None:
    """Return the first row of [B, ...] that holds inf or nan."""
    wrong = ~torch.isfinite(values).flatten(1).all(dim=1)
    return int(wrong.int().argmax()) if bool(wrong.any()) else None
