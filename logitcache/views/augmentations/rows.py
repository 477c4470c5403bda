"""What augmentations share that change images one by one."""

from collections.abc import Callable, Iterable

from torch import Tensor

from logitcache.errors import DataError


def replace_rows(images: Tensor, rows: Iterable[int], change: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Copy `images` [B, C, H, W] with `change(row, image)` in place of each of `rows`; without rows, copy nothing."""
    changed = {row: change(row, images[row]) for row in rows}
    if not changed:
        return images
    result = images.clone()
    for row, image in changed.items():
        result[row] = image
    return result


def require_colors(kind: str, images: Tensor) -> None:
    """Raise DataError unless the images have one channel or three, all that torchvision's color kernels take."""
    if images.shape[1] not in (1, 3):
        raise DataError(
            f"{kind} takes images of 1 channel (grey) or 3 (RGB), these have {images.shape[1]}. "
            f"Fix: read them as RGB or L, or leave {kind} out of views.augmentations"
        )


def require_values(field: str, values: tuple[int, ...], images: Tensor) -> None:
    """Raise DataError unless there is one value, or one for each channel."""
    if len(values) not in (1, images.shape[1]):
        raise DataError(
            f"{field} has {len(values)} values {list(values)}, the images have {images.shape[1]} channels. "
            "Fix: give one number, or a list of one for each channel"
        )
