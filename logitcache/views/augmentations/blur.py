"""Blurring."""

from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator
from torch import Tensor

from logitcache.config.recipe import Fraction, Lenient
from logitcache.errors import DataError
from logitcache.views.augmentations.base import Ordered, Scale, Size, TorchvisionBase, kernels, pair, replace_rows
from logitcache.views.keys import Draws, Ints, bernoulli, uniform

STEPS = 65536
"""Standard deviations are multiples of 1 / STEPS."""
# At least one step, since torchvision divides by it; at most what is a flat average for any kernel.
Sigma = Annotated[float, Field(ge=1 / STEPS, le=65536.0), Lenient]


class GaussianBlur(TorchvisionBase):
    """Apply a Gaussian blur. Borders are mirrored."""

    columns: ClassVar[tuple[str, ...]] = ("applied", "sigma")

    kind: Literal["gaussian_blur"] = "gaussian_blur"
    kernel_size: Size = Field(
        description="Side of the kernel in pixels, an odd number, or [width, height] in torchvision's order.",
        examples=[3, [5, 3]],
    )
    sigma: Annotated[tuple[Sigma, Sigma], Ordered] = Field(
        default=(0.1, 2.0), description="Range in pixels from which the standard deviation is drawn uniformly."
    )
    p: Fraction = Field(default=1.0, description="Probability that an image is blurred.")

    def idle(self, epochs: float) -> str | None:
        """Return why nothing is ever blurred."""
        if pair(self.kernel_size) == (1, 1):
            return "has a kernel of one pixel, which blurs nothing. Fix: kernel_size: 3 or more, or leave it out"
        return super().idle(epochs)

    @field_validator("kernel_size")
    @classmethod
    def _odd(cls, size: Size) -> Size:
        if any(side % 2 == 0 for side in pair(size)):
            raise ValueError("a kernel has a centre: its size is odd")
        return size

    def plan(self, draws: Draws, ordinal: int, sizes: Ints) -> tuple[Ints, Ints]:
        """Draw one bit and the standard deviation, in multiples of 1 / STEPS."""
        width, height = pair(self.kernel_size)
        missing = (np.array([height, width]) // 2 + 1 - sizes).max(axis=1, initial=0)
        if (missing > 0).any():  # a reflection would repeat more pixels than there are
            row = int(np.argmax(missing))
            raise DataError(
                f"gaussian_blur cannot mirror the borders of image {int(draws.indices[row])} of size "
                f"{tuple(sizes[row].tolist())} for a kernel of height {height} and width {width}. "
                "Fix: a smaller kernel_size, or resize first"
            )
        words = draws.words("blur", ordinal, 2)
        low, high = self.sigma
        sigmas = np.rint((low + (high - low) * uniform(words[:, 1])) * STEPS).astype(np.int64)
        return np.stack([bernoulli(words[:, 0], self.p).astype(np.int64), sigmas], axis=1), sizes

    def beside(self, scale: Scale, channels: int) -> None:
        """Return None: it moves no pixel."""

    def apply(self, images: Tensor, params: Ints) -> Tensor:
        """Blur the chosen images."""
        size, sigmas = list(pair(self.kernel_size)), (params[:, 1] / STEPS).tolist()
        return replace_rows(
            images,
            np.flatnonzero(params[:, 0]).tolist(),
            lambda row, image: kernels().gaussian_blur_image(image, size, [sigmas[row], sigmas[row]]),
        )
