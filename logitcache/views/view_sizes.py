"""Sizes of views: all views of a data set must have one, which their plans show before any image is decoded."""

from collections.abc import Sequence

from logitcache.errors import DataError
from logitcache.views.keys import Ints, ViewKey
from logitcache.views.spec import FIX_OF_SIZES, Views

_BLOCK = 4096  # images planned at a time


def require_one_size(views: Views) -> None:
    """Raise DataError naming images whose views cannot be drawn or have another size, before any is decoded."""
    sizes, ids = views.images.sizes(), views.dataset.ids
    first = None
    for start in range(0, len(ids), _BLOCK):
        keys = [ViewKey(0, index) for index in range(start, min(start + _BLOCK, len(ids)))]
        found = _sizes_of_views(views, keys, sizes[start : start + _BLOCK])
        first = found[0] if first is None else first
        if (found != first).any():
            row = int((found != first).any(axis=1).argmax())
            raise DataError(
                f"views must have one size: {ids[0]!r} gives {tuple(first.tolist())}, {ids[start + row]!r} gives "
                f"{tuple(found[row].tolist())}. Fix: {FIX_OF_SIZES}"
            )


def _sizes_of_views(views: Views, keys: Sequence[ViewKey], sizes: Ints) -> Ints:
    try:
        return views.planned_sizes(keys, sizes)
    except DataError as error:
        if len(keys) == 1:
            raise DataError(f"{views.dataset.ids[keys[0].index]!r}: {error}") from error
        half = len(keys) // 2  # to the image that is to blame
        _sizes_of_views(views, keys[:half], sizes[:half])
        return _sizes_of_views(views, keys[half:], sizes[half:])
