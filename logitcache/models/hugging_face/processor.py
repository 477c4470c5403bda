"""The preprocessing that an image processor of transformers states."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from logitcache.classifier import Interpolation, Preprocessing
from logitcache.models.hugging_face.folder import library
from logitcache.runtime.console import logger

_FILES = ("preprocessor_config.json", "processor_config.json")
_RESAMPLE: dict[int, Interpolation] = {2: "bilinear", 3: "bicubic"}
"""Pillow's numbers of filters."""


def preprocessing_of(folder: Path, in_channels: int) -> Preprocessing | None:
    """Return mean, std, size and interpolation; None without a processor, or for one that does more, which is logged.

    A processor computes (pixel * rescale_factor - mean) / std.
    """
    if not any((folder / name).is_file() for name in _FILES):
        return None
    try:
        stated = library().AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return _preprocessing(stated.to_dict(), in_channels)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
    except (OSError, ValueError, TypeError, ImportError, LookupError) as error:
        reason = str(error).strip().partition("\n")[0]
    logger.warning(f"the image processor in {folder} is not followed: {reason}. Fix: give `preprocessing:`")
    return None


def _preprocessing(stated: dict[str, Any], in_channels: int) -> Preprocessing:
    """Translate a processor. Raises ValueError for steps that a Preprocessing does not have."""
    for step in ("do_flip_channel_order", "rescale_offset", "do_reduce_labels", "do_color_quantize"):
        if stated.get(step):
            raise ValueError(f"it has {step}")
    factor = stated.get("rescale_factor", 1 / 255) if stated.get("do_rescale", True) else 1.0
    normalised = stated.get("do_normalize", True)
    means = stated.get("image_mean") if normalised else [0.0] * in_channels
    stds = stated.get("image_std") if normalised else [1.0] * in_channels
    if means is None or stds is None:
        raise ValueError("it normalises by no image_mean and image_std")
    # Rounded where factor and 255 cancel but for their last bits.
    scale = 1.0 if abs(factor * 255 - 1) < 1e-6 else factor * 255
    return Preprocessing(
        mean=tuple(float(mean) / scale for mean in means),
        std=tuple(float(std) / scale for std in stds),
        input_size=_size(stated),
        interpolation=_interpolation(stated),
    )


def _interpolation(stated: dict[str, Any]) -> Interpolation:
    number = stated.get("resample")
    if not stated.get("do_resize", True) or number is None:
        return "bilinear"
    if int(number) not in _RESAMPLE:
        raise ValueError(f"it resizes by filter {int(number)} of Pillow, neither bilinear (2) nor bicubic (3)")
    return _RESAMPLE[int(number)]


def _size(stated: dict[str, Any]) -> tuple[int, int] | None:
    """Return height and width after the crop, if there is one, else after the resize."""
    cropped = stated.get("do_center_crop") and stated.get("crop_size") is not None
    size = stated.get("crop_size") if cropped else stated.get("size")
    if size is None or not (cropped or stated.get("do_resize", True)):
        return None
    if isinstance(size, int):
        return size, size
    if "height" in size and "width" in size:
        return int(size["height"]), int(size["width"])
    if "shortest_edge" in size:
        return int(size["shortest_edge"]), int(size["shortest_edge"])
    raise ValueError(f"its size is {size}")
