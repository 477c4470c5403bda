"""Pictures: an image as a model gets it, pixel by pixel."""

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from logitcache.report.figures.base import Figure, FigureRows, opened

_SIDE = 150
_MOST_PIXELS = 300
"""Pixels of a picture's longer side on the page, and in the file."""


def as_image(pixels: NDArray[np.uint8]) -> Image.Image:
    """Return pixels, uint8 [C, H, W] of one or three channels, as an image of Pillow."""
    return Image.fromarray(np.ascontiguousarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)))


def picture(
    pixels: NDArray[np.uint8], rows: FigureRows = (), *, title: str = "", caption: str = "", side: int = _SIDE
) -> Figure:
    """Show pixels, uint8 [C, H, W] of one or three channels; `rows` are data about the image, for its CSV."""
    image = as_image(pixels)
    image.thumbnail((_MOST_PIXELS, _MOST_PIXELS))
    width, height = (round(side * length / max(image.size)) for length in image.size)
    # Large pictures are JPEG, whose losses are invisible at this size.
    form = "png" if max(image.size) <= 64 else "jpeg"
    file = io.BytesIO()
    image.save(file, form, quality=88)
    data = f"data:image/{form};base64,{base64.b64encode(file.getvalue()).decode()}"
    shown = f'<image width="{width}" height="{height}" style="image-rendering: pixelated" href="{data}"/>'
    return Figure(title, f"{opened(title, width, height)}{shown}</svg>", rows, caption)
