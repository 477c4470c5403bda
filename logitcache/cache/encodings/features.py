"""Features: the reduction of a tap, and its stored form."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from logitcache.cache.encodings.base import Fitted, RowArray, TableShape
from logitcache.cache.format.arrays import Storage
from logitcache.config.recipe import Component, Count, Extended
from logitcache.errors import RecipeError
from logitcache.reductions import (
    ChannelLayout,
    FeatureKind,
    as_maps,
    attention,
    channels_in_place,
    grad_cam,
    pooled,
    resized,
)
from logitcache.targets import CompactFeature, FeatureValues

LEVELS = 127
DIMS: dict[tuple[str, int], tuple[str, ...]] = {
    ("pooled", 1): ("channel",),
    ("maps", 1): ("channel",),
    ("maps", 2): ("token", "channel"),
    ("maps", 3): ("channel", "height", "width"),
    ("attention", 1): ("token",),
    ("attention", 2): ("height", "width"),
    ("grad_cam", 1): ("token",),
    ("grad_cam", 2): ("height", "width"),
}
"""Names of the axes of a feature, by its kind and number of axes."""

_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "pooled": pooled,
    "maps": lambda values: values,
    "attention": attention,
}


class Feature(Extended):
    """The output or input of a module of the teacher, for losses on features.

    Errors of `int8` and `channels` are recorded. `float16` rounds each number to 11 bits: its relative error is at most
    2⁻¹¹ from 6·10⁻⁵ on (below, 3·10⁻⁸ absolute), and numbers beyond its range are refused. With `views.targets: linear`
    there are no features.
    """

    added: ClassVar[frozenset[str]] = frozenset({"layout"})

    kind: FeatureKind = Field(
        description="What to store. `pooled`: the mean over positions or tokens. `maps`: maps [C, H, W], tokens [N, D] "
        "or vectors as they are. `attention`: the mean of squares over channels. `grad_cam`: the Grad-CAM map of the "
        "label (of the predicted class, without a label); it takes a backward pass and the memory of a training step.",
        examples=["pooled"],
    )
    tap: Annotated[str, Field(min_length=1, max_length=200)] = Field(
        description="Path of a module, as in `named_modules`; with the suffix `:input`, its input. The module must run "
        "exactly once per forward pass. `logitcache plan RECIPE --taps` lists all.",
        examples=["layer4"],
    )
    layout: ChannelLayout = Field(
        default="auto",
        description="Channel axis of the module's output: `channels_first` ([C, H, W] or [C, N]), `channels_last` ([H, "
        "W, C], as in Swin) or `tokens` ([N, D]). `auto` determines it from the axes that change when the image is "
        "twice as large, or else from timm's `feature_info` or the shape; it is an error if none of them decides.",
    )
    size: Count | tuple[Count, Count] | None = Field(
        default=None,
        description="Height and width to which maps are resized, by averaging over areas; one number for both. By "
        "default they keep their size.",
        examples=[7],
    )
    channels: Count | None = Field(
        default=None,
        description="Number of leading components to store, in a basis fitted to calibration rows; losses get features "
        "of full width. By default all channels are stored.",
        examples=[64],
    )
    dtype: Literal["float16", "float32", "int8"] = Field(
        default="float16",
        description="Type of the numbers; `int8` has one float32 scale per channel of maps, per token, or per vector.",
    )
    storage: Storage = "hot"

    @model_validator(mode="after")
    def _options_agree(self) -> Self:
        if self.size is not None and self.kind == "pooled":
            raise ValueError("size is of maps: a pooled feature has none. Leave it out")
        if self.channels is not None and self.kind not in ("pooled", "maps"):
            raise ValueError(f"channels: {self.kind} has one channel. Leave it out")
        return self

    @property
    def measured(self) -> bool:
        """Whether the error of every row is recorded: for forms that lose more than the rounding of a float."""
        return self.channels is not None or self.dtype == "int8"

    def take(self, values: Tensor, gradient: Tensor | None) -> Tensor:
        """Reduce a tapped tensor [B, ...] to the feature; `gradient` of the class logit is for grad_cam."""
        values = channels_in_place(values, self.layout)
        gradient = None if gradient is None else channels_in_place(gradient, self.layout)
        if self.size is not None:
            values = as_maps(values)
            gradient = None if gradient is None else as_maps(gradient)
        if gradient is not None and self.kind == "grad_cam":
            values = grad_cam(values, gradient)
        else:
            values = _REDUCTIONS[self.kind](values)
        if self.size is not None:
            values = resized(values, (self.size, self.size) if isinstance(self.size, int) else self.size)
        if (self.kind, values.ndim - 1) not in DIMS:
            raise RecipeError(
                f"the tap {self.tap!r} holds {list(values.shape[1:])} for each image, which is neither a vector [C], "
                "tokens [N, D] nor maps [C, H, W]. Fix: tap another module"
            )
        return values.to(torch.float32, copy=True)

    def fitted(self, vectors: Callable[[], Tensor], shape: tuple[int, ...]) -> "FittedFeature":
        """Fit the form to channel vectors [M, C], which are computed only if the form needs them."""
        form = FeatureForm(dtype=self.dtype, storage=self.storage, channels=self.channels)
        if self.channels is None:
            return FittedFeature(form, {}, self.kind, shape)
        if self.channels >= shape[form.axis(shape)]:
            raise RecipeError(
                f"channels: {self.channels} of {shape[form.axis(shape)]} at the tap {self.tap!r}: that is all. Fix: "
                "fewer, or leave it out"
            )
        sample = vectors().double()
        mean = sample.mean(dim=0)
        scatter = (sample - mean).T @ (sample - mean)
        basis = torch.linalg.eigh(scatter).eigenvectors.flip(1).T[: self.channels]
        tables = {"centre": mean.float().numpy(), "basis": basis.float().contiguous().numpy()}
        return FittedFeature(form, tables, self.kind, shape)


class FeatureForm(Component):
    """Stored form of a feature: its numbers, or their components in a stored basis."""

    table_names: ClassVar[frozenset[str]] = frozenset({"centre", "basis"})

    dtype: Literal["float16", "float32", "int8"]
    storage: Storage
    channels: Count | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the feature's own numbers are stored."""
        return self.dtype != "int8" and self.channels is None

    def axis(self, shape: tuple[int, ...]) -> int:
        """Return the channel axis of a feature of shape [C], [N, D] or [C, H, W]."""
        return 1 if len(shape) == 2 else 0

    def kept_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the stored rows of a feature."""
        axis = self.axis(shape)
        return shape if self.channels is None else (*shape[:axis], self.channels, *shape[axis + 1 :])

    def arrays(self, kind: FeatureKind, shape: tuple[int, ...]) -> tuple[RowArray, ...]:
        """List the arrays of a feature. Raises RecipeError for a shape that its kind cannot have."""
        if (kind, len(shape)) not in DIMS:
            raise RecipeError(f"a feature of kind {kind} has no shape {list(shape)}")
        dims, kept = DIMS[kind, len(shape)], self.kept_shape(shape)
        if self.dtype != "int8":
            return (RowArray("", kept, self.dtype, dims),)
        scales = kept[:1] if len(kept) > 1 else ()
        return (RowArray("level", kept, "int8", dims), RowArray("scale", scales, "float32", dims[: len(scales)]))

    def table_shapes(self, shape: tuple[int, ...]) -> dict[str, TableShape]:
        """List the tables: centre and basis, if channels are projected."""
        if self.channels is None:
            return {}
        width = shape[self.axis(shape)]
        return {"centre": TableShape((width,), "float32"), "basis": TableShape((self.channels, width), "float32")}


@dataclass(frozen=True, eq=False)
class FittedFeature(Fitted):
    """Encode features [B, *shape] to arrays, and decode them.

    tables: centre, float32 [C], and basis, float32 [K, C], orthonormal rows, if channels are projected.
    """

    form: FeatureForm
    kind: FeatureKind
    shape: tuple[int, ...]

    def encode(self, values: Tensor) -> dict[str, Tensor]:
        """Encode features, float32 [B, *shape]."""
        kept = self._projected(values)
        if self.form.dtype != "int8":
            return {"": kept.half() if self.form.dtype == "float16" else kept}
        axes = tuple(range(2 if kept.ndim > 2 else 1, kept.ndim))
        # Any scale fits zeros. Subnormal scales have too few digits, and some devices flush them to zero.
        scale = (kept.abs().amax(dim=axes, keepdim=True) / LEVELS).clamp(min=torch.finfo(torch.float32).tiny)
        return {"level": (kept / scale).round().to(torch.int8), "scale": scale.squeeze(axes)}

    def decode(self, rows: Mapping[str, Tensor]) -> FeatureValues:
        """Return float32 features unchanged, others in a compact form that becomes float32 on the device."""
        if self.form.is_plain and self.form.dtype == "float32":
            return rows[""]
        return CompactFeature(rows, self.shape, self._values)

    def _values(self, rows: Mapping[str, Tensor]) -> Tensor:
        if self.form.dtype == "int8":
            level, scale = rows["level"].float(), rows["scale"].float()
            kept = level * scale.reshape(*scale.shape, *(1,) * (level.ndim - scale.ndim))
        else:
            kept = rows[""].float()
        if self.form.channels is None:
            return kept
        placed = self._on(kept.device)
        axis = self.form.axis(self.shape) + 1
        with torch.autocast(kept.device.type, enabled=False):
            return (kept.movedim(axis, -1) @ placed["basis"] + placed["centre"]).movedim(-1, axis)

    def _projected(self, values: Tensor) -> Tensor:
        if self.form.channels is None:
            return values.float()
        placed = self._on(values.device)
        axis = self.form.axis(self.shape) + 1
        with torch.autocast(values.device.type, enabled=False):
            return ((values.float().movedim(axis, -1) - placed["centre"]) @ placed["basis"].T).movedim(-1, axis)
