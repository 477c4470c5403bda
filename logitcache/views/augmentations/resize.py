"""Resizing, with antialiasing.

Resampling by exact arithmetic: the same bytes on every machine, for any batch and any number of threads.

The filters of Pillow for 8-bit images: an antialiasing triangle (bilinear) or cubic (a = -0.5, bicubic), along the rows
first and then along the columns, each pass rounded to uint8. Each pass is Pillow's to the bit; which pass comes first
depends on its release and on the sizes. Weights are multiples of 2⁻²², from float64 `+ - * /`,
floor and rint alone. With them every partial sum in a pass is a multiple of 2⁻²² and below 2¹⁰ (255 times the sum of
the absolute weights, below 2), so float64 holds it exactly and no order of summation changes a bit. Float32 would hold
coarser weights exactly too, but autocast and torch's reduced matmul precisions would round it to bfloat16.
"""

import functools
from typing import Annotated, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import AfterValidator, Field, ValidationInfo
from torch import Tensor

from logitcache.runtime.device import to_device
from logitcache.views.augmentations.base import Interpolation, ResizingBase, Scale, Size, kernels, sizes_of
from logitcache.views.keys import Draws, Ints

Filter = Literal["bilinear", "bicubic"]

Floats = NDArray[np.float64]

_ONE = 1 << 22

_SUPPORT = {"bilinear": 1.0, "bicubic": 2.0}

_SMALL = 64  # longest side of images whose weights are kept, and which are resampled as one batch

_TILE = 32  # outputs of a large image that share one matrix: the weights farther away are zero


def _with_weights(kernel: str, info: ValidationInfo) -> str:
    """Raise ValueError for an exact kernel with `nearest`."""
    if kernel == "exact" and info.data.get("interpolation") == "nearest":
        raise ValueError("exact is for bilinear and bicubic; nearest copies pixels: leave kernel out")
    return kernel


Kernel = Annotated[Literal["torchvision", "exact"], AfterValidator(_with_weights), Field(validate_default=True)]
"""Of a component with `interpolation` before it. torchvision is fast, and its pixels may differ by one level between
CPUs; exact gives the same bytes on every machine."""


def crop_and_resize(
    images: Tensor, boxes: Ints, size: tuple[int, int], interpolation: Interpolation, kernel: Kernel
) -> Tensor:
    """Cut `boxes` [B, 4] (top, left, height, width) out of [B, C, H, W] and resize them to `size`."""
    if kernel == "exact":
        assert interpolation != "nearest"
        return resample(images, boxes, size, interpolation)
    from torchvision.transforms import InterpolationMode

    mode, out = InterpolationMode(interpolation), list(size)
    # The kernel itself: dispatching on the type of image takes as long as resizing a small one.
    return torch.stack(
        [
            kernels().resize_image(image[:, top : top + height, left : left + width], out, mode, antialias=True)
            for image, (top, left, height, width) in zip(images, boxes.tolist(), strict=True)
        ]
    )


class Resize(ResizingBase):
    """Resize the whole image."""

    columns: ClassVar[tuple[str, ...]] = ("height", "width")

    kind: Literal["resize"] = "resize"
    size: Size = Field(
        description="Length of the shorter side in pixels, or [height, width].", examples=[256, [224, 224]]
    )
    interpolation: Interpolation = Field(default="bilinear", description="Interpolation of the resize.")
    kernel: Kernel = Field(
        default="torchvision",
        description="Arithmetic of the resize. `torchvision` is fast, and its pixels may differ by a few levels "
        "between CPUs; `exact` uses integer weights and gives the same bytes on every machine.",
    )

    @property
    def is_random(self) -> bool:
        """Whether its parameters differ from view to view: they follow from the size of the image."""
        return False

    def plan(self, draws: Draws, ordinal: int, sizes: Ints) -> tuple[Ints, Ints]:
        """Compute the new height and width."""
        scaled = self.results(sizes)
        return scaled, scaled

    def smallest(self, sizes: Ints) -> Ints:
        """Return the whole image."""
        return sizes

    def results(self, sizes: Ints) -> Ints:
        """Return the new heights and widths."""
        if isinstance(self.size, int):
            return np.asarray(self.size * sizes // sizes.min(axis=1, keepdims=True), np.int64)
        return sizes_of(len(sizes), self.size)

    def beside(self, scale: Scale, channels: int) -> Self:
        """Return itself: the parameters are the sizes."""
        return self

    def carried(self, params: Ints, before: Ints, after: Ints, others: Ints, scale: Scale) -> tuple[Ints, Ints]:
        """Scale the new sizes."""
        return scale(after), scale(after)

    def apply(self, images: Tensor, params: Ints) -> Tensor:
        """Resize with antialiasing."""
        height, width = params[0].tolist()  # equal for all rows: the images have one size
        boxes = sizes_of(len(images), (0, 0, *images.shape[2:]))
        return crop_and_resize(images, boxes, (height, width), self.interpolation, self.kernel)

    def in_batches(self, size: tuple[int, int]) -> bool:
        """Take small images, by the exact kernel."""
        scaled = self.size * max(size) // min(size) if isinstance(self.size, int) else max(self.size)
        return resampled_together(size, (scaled, scaled), self.kernel)

    apply_in_batches = apply


def resampled_together(size: tuple[int, int], out: tuple[int, int], kernel: Kernel) -> bool:
    """Return whether images of (height, width) are brought to another as one batch, by exact arithmetic."""
    return kernel == "exact" and max(*size, *out) <= _SMALL


def resample(images: Tensor, boxes: Ints, size: tuple[int, int], interpolation: Filter) -> Tensor:
    """Cut `boxes` [B, 4] (top, left, height, width) out of [B, C, H, W] and bring them to `size`."""
    if max(*images.shape[-2:], *size) <= _SMALL:
        return _resample_together(images, boxes, size, interpolation)
    cut = [
        image[:, top : top + height, left : left + width]
        for image, (top, left, height, width) in zip(images, boxes.tolist(), strict=True)
    ]
    return torch.stack([_resample_alone(box, size, interpolation) for box in cut])


def _resample_together(images: Tensor, boxes: Ints, size: tuple[int, int], interpolation: Filter) -> Tensor:
    """Resample a batch by two products with matrices [B, out, in] that are zero outside the boxes."""
    count, channels, height, width = images.shape
    vertical = _matrices(boxes[:, 0], boxes[:, 2], height, size[0], interpolation, images.device)
    horizontal = _matrices(boxes[:, 1], boxes[:, 3], width, size[1], interpolation, images.device)
    pixels = images.permute(0, 2, 1, 3).to(torch.float64, memory_format=torch.contiguous_format)
    rows = _rounded(pixels.view(count, height * channels, width) @ horizontal.mT).floor_()
    whole = _rounded(vertical @ rows.view(count, height, channels * size[1]))
    return whole.to(torch.uint8).view(count, size[0], channels, size[1]).permute(0, 2, 1, 3)


def _matrices(starts: Ints, lengths: Ints, side: int, out: int, interpolation: Filter, device: torch.device) -> Tensor:
    matrices = np.zeros((len(starts), out, side))
    for matrix, start, length in zip(matrices, starts.tolist(), lengths.tolist(), strict=True):
        matrix[:, start : start + length] = _small_matrix(length, out, interpolation)
    return to_device(torch.from_numpy(matrices), device)


@functools.lru_cache(maxsize=512)  # 32 kB each at most
def _small_matrix(length: int, out: int, interpolation: Filter) -> Floats:
    return _matrix(*taps(length, out, interpolation))


def _resample_alone(image: Tensor, size: tuple[int, int], interpolation: Filter) -> Tensor:
    """Resample an image [C, H, W] by the bands of its weight matrices, which are mostly zero."""
    channels, height, width = image.shape
    pixels = image.permute(1, 0, 2).to(torch.float64, memory_format=torch.contiguous_format)
    rows = pixels.new_empty((height * channels, size[1]))
    flat = pixels.view(height * channels, width)
    for outputs, inputs, matrix in _bands(width, size[1], interpolation):
        rows[:, outputs] = flat[:, inputs] @ matrix.mT
    rows = _rounded(rows).floor_().view(height, channels * size[1])
    whole = rows.new_empty((size[0], channels * size[1]))
    for outputs, inputs, matrix in _bands(height, size[0], interpolation):
        torch.mm(matrix, rows[inputs], out=whole[outputs])
    return _rounded(whole).to(torch.uint8).view(size[0], channels, size[1]).permute(1, 0, 2)


def _bands(length: int, out: int, interpolation: Filter) -> list[tuple[slice, slice, Tensor]]:
    """Return ranges of outputs, the ranges of inputs that they depend on, and the weights between the two."""
    starts, weights = taps(length, out, interpolation)
    bands = []
    for first in range(0, out, _TILE):
        some = slice(first, min(first + _TILE, out))
        begin = int(starts[first])
        matrix = _matrix(starts[some] - begin, weights[some])
        bands.append((some, slice(begin, begin + matrix.shape[1]), torch.from_numpy(matrix)))
    return bands


def _matrix(starts: Ints, weights: Floats) -> Floats:
    """Lay taps out as a matrix [out, in]."""
    num_taps = weights.shape[1]
    matrix = np.zeros((len(starts), int(starts[-1]) + num_taps))
    np.put_along_axis(matrix, starts[:, None] + np.arange(num_taps), weights, axis=1)
    return matrix


def taps(length: int, out: int, interpolation: Filter) -> tuple[Ints, Floats]:
    """Return for each output pixel the first input pixel [out], ascending, and the weights from there on [out, T].

    A weight is the filter, as wide as the pixels of the coarser side, at the distance of the pixels' centres, divided
    by the sum of all.
    """
    scale = length / out
    width = max(scale, 1.0)
    num_taps = min(int(np.ceil(2 * _SUPPORT[interpolation] * width)) + 1, length)
    centres = (np.arange(out) + 0.5) * scale
    starts = np.floor(centres - _SUPPORT[interpolation] * width + 0.5).astype(np.int64)
    starts = np.clip(starts, 0, length - num_taps)
    places = starts[:, None] + np.arange(num_taps)
    raw = _FILTERS[interpolation](np.abs((places - centres[:, None] + 0.5) / width))
    # Summed one by one: the order in which np.sum adds depends on the machine.
    total = np.add.accumulate(raw, axis=1)[:, -1:]
    weights: Floats = np.rint(raw / total * _ONE) / _ONE
    return starts, weights


def _triangle(x: Floats) -> Floats:
    return np.maximum(1.0 - x, 0.0)


def _cubic(x: Floats) -> Floats:
    """Return Keys' kernel with a = -0.5."""
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


_FILTERS = {"bilinear": _triangle, "bicubic": _cubic}


def _rounded(values: Tensor) -> Tensor:
    """Bring sums to 0..255.99, so that leaving out the fraction rounds them, halves upwards; in place."""
    return values.add_(0.5).clamp_(0.0, 255.0)
