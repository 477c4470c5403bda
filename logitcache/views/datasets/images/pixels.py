"""Pixels: from whatever holds an image to uint8 [C, H, W]."""

from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field
from torch import Tensor

Mode = Annotated[Literal["L", "RGB"], Field(description="Channels of the pixels: `RGB`, or `L` for grey.")]

_WIDE_GREY = ("I", "I;16", "I;16B", "I;16L", "I;16N")
_GREY = ("1", "L", "LA", "La", *_WIDE_GREY)
_MOST_CHANNELS = 4


def from_pil(image: Image.Image, mode: Mode | None) -> Tensor:
    """Return uint8 [C, H, W]: C is 1 for mode L and 3 for RGB; without a mode, as the image is.

    Pillow converts, as in torchvision; but 16-bit grey loses its low byte; Pillow would clip it. Raises ValueError for
    floating-point images and for integers above 16 bits.
    """
    mode = mode or ("L" if image.mode in _GREY else "RGB")
    if image.mode == "F":
        raise ValueError("it holds floating-point values, whose range is unknown. Save it with 8 or 16 bits")
    if image.mode in _WIDE_GREY:
        image = _narrowed(image)
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # equal colours; the short way warns
    return _channels_first(np.array(image if image.mode == mode else image.convert(mode)))


def from_value(value: object, mode: Mode | None = None) -> Tensor:
    """Return uint8 [C, H, W] of a PIL image, in a mode as `from_pil`, of a uint8 tensor or a uint8 array.

    Tensors are [C, H, W] or [H, W], arrays [H, W, C] or [H, W]. Raises ValueError for others.
    """
    if isinstance(value, Image.Image):
        return from_pil(value, mode)
    if isinstance(value, Tensor):
        return _from_tensor(value)
    if isinstance(value, np.ndarray):
        return _from_array(value)
    raise ValueError(f"an image is a PIL image, a uint8 tensor or a uint8 array, not {type(value).__name__}")


def _narrowed(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError(
            f"it holds integers from {values.min()} to {values.max()}, beyond 16 bits. Save it with 8 or 16 bits"
        )
    return Image.fromarray((values >> 8).astype(np.uint8))


def _from_tensor(value: Tensor) -> Tensor:
    if value.dtype != torch.uint8:
        raise ValueError(_wrong_dtype(f"a {value.dtype} tensor", value.is_floating_point()))
    plain = type(value) is Tensor and value.device.type == "cpu"
    image = value if plain else value.detach().as_subclass(Tensor).cpu()
    if image.ndim == 2:
        image = image[None]
    if image.ndim != 3 or 0 in image.shape:
        raise ValueError(f"a tensor image is [C, H, W] or [H, W], not {list(value.shape)}")
    if image.shape[0] > _MOST_CHANNELS >= image.shape[2]:
        raise ValueError(
            f"a tensor image is [C, H, W]; {list(value.shape)} looks like [H, W, C]. Return image.permute(2, 0, 1)"
        )
    return image


def _from_array(value: NDArray[np.generic]) -> Tensor:
    if value.dtype != np.uint8:
        raise ValueError(_wrong_dtype(f"a {value.dtype} array", value.dtype.kind == "f"))
    if value.ndim not in (2, 3) or 0 in value.shape:
        raise ValueError(f"an array image is [H, W, C] or [H, W], not {list(value.shape)}")
    if value.ndim == 3 and value.shape[2] > _MOST_CHANNELS >= value.shape[0]:
        raise ValueError(
            f"an array image is [H, W, C]; {list(value.shape)} looks like [C, H, W]. Return image.transpose(1, 2, 0)"
        )
    return _channels_first(np.array(value, np.uint8))


def _channels_first(image: NDArray[np.uint8]) -> Tensor:
    """Return a view [C, H, W] of an array [H, W, C] or [H, W]."""
    pixels = torch.from_numpy(image)
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def _wrong_dtype(found: str, floating: bool) -> str:
    fix = (
        "Leave out ToTensor() and Normalize(): the teacher owns its normalisation. "
        "Of values from 0 to 1 return (image * 255).round() as uint8"
        if floating
        else "Return uint8"
    )
    return f"images are uint8, not {found}. {fix}"
