"""`Teacher`: a frozen model that owns its normalisation; uint8 pixels in, `Targets` out."""

import torch
from torch import Tensor, nn

from logitcache.cache.encodings import Dense, Encoding
from logitcache.device import Precision, autocast
from logitcache.errors import DataError, RecipeError
from logitcache.models import BuiltModel, Classifier, Model, Preprocessing, resolve_preprocessing
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
        self.classifier = classifier.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Targets:
        """Answer uint8 pixels [B, C, H, W] on the teacher's device: logits float32 [B, K]."""
        with autocast(self.device, self.precision):
            logits = self.classifier(pixels)
        if len(logits) != len(pixels):
            raise RecipeError(f"teacher {self.name!r} returns {len(logits)} rows of logits for {len(pixels)} images")
        return Targets(logits.float())


def build_teacher(
    name: str, source: TeacherSource, module: nn.Module | None, in_channels: int, device: torch.device
) -> Teacher:
    """Build a teacher from its recipe entry, or around the caller's own `module`."""
    if module is not None:
        built = BuiltModel(module, None)
    elif source.model is not None:
        built = source.model.build(None, in_channels)
    else:
        raise RecipeError(f"teachers.{name} names no model. Fix: give `model:`, or pass the module itself")
    chosen = resolve_preprocessing(built, source.preprocessing, who=f"teachers.{name}")
    return Teacher(name, Classifier(built.module, chosen), source.precision, device)


def require_finite(name: str, encoded: dict[str, Tensor], first: int) -> None:
    """Raise DataError naming the first image of a batch whose answer is not finite or does not fit the stored dtype."""
    for suffix, values in encoded.items():
        if values.is_floating_point() and not bool(torch.isfinite(values).all()):
            row = int((~torch.isfinite(values.flatten(1))).any(dim=1).int().argmax())
            raise DataError(
                f"teacher {name!r}: {suffix or 'logits'} of image {first + row} is not finite as {values.dtype}. "
                "Fix: store {kind: dense, dtype: float32} where float16 (up to 65504) is too narrow; else the teacher "
                "itself gives inf or nan"
            )
