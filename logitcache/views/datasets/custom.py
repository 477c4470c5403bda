"""Custom: the user's own data set, from a function in a recipe or as an object from Python."""

import inspect
from collections.abc import Sequence
from typing import Literal, cast

from pydantic import Field, JsonValue

from logitcache.config.factories import call_factory
from logitcache.errors import DataError
from logitcache.views.datasets.base import DatasetBase, ImageDataset
from logitcache.views.datasets.images.ids import NumberedIds, PackedIds
from logitcache.views.datasets.images.pixels import from_value
from logitcache.views.datasets.map_style import MapImages, MapStyle, num_items

_OFFERED = ("ids", "labels", "num_classes", "class_names", "read", "sizes", "digests")


class Custom(DatasetBase):
    """The data set that your own function returns: a map-style torch data set or an ImageDataset.

    Its items are images, or images and labels; its images are PIL images, uint8 tensors [C, H, W] or uint8 arrays [H,
    W, C]. Code named in a cache is never run: a student of such a cache names the data set again, in its own `dataset`.
    """

    kind: Literal["custom"] = "custom"
    factory: str = Field(
        description="Function that returns the data set, as `package.module:function`.",
        examples=["mypackage.data:photos"],
    )
    arguments: dict[str, JsonValue] = Field(default={}, description="Keyword arguments of the function.")

    def risks(self) -> tuple[str, ...]:
        """Name the function: code, which no grant lets a manifest name."""
        return (f"the function '{self.factory}'",)

    def open(self) -> ImageDataset:
        """Call the function; raises RecipeError if that fails, DataError for no data set."""
        return as_image_dataset(call_factory(self.factory, self.arguments), f"'{self.factory}'")


def as_image_dataset(dataset: object, name: str = "the data set") -> ImageDataset:
    """Return a map-style object as an ImageDataset; one that is an ImageDataset passes through.

    An item is an image or (image, label); an image is a PIL image, a uint8 tensor [C, H, W] or
    [H, W], or a uint8 array [H, W, C] or [H, W]; a label is the index of a class, or of any number
    of classes a vector with 1 (there), 0 (not there) or -1 (unknown) for each. `ids`, `classes` and
    `num_classes` of the object are used. Raises DataError for anything else.
    """
    if all(_offers(dataset, attribute) for attribute in _OFFERED):
        return cast(ImageDataset, dataset)
    if not _offers(dataset, "__getitem__"):
        raise DataError(
            f"{name} is of type {type(dataset).__name__}, which has no images by index.\n"
            "  Fix: return a torch Dataset with __len__ and __getitem__."
        )
    source = cast(MapStyle, dataset)
    length = num_items(source, name)
    return MapImages(
        source,
        name,
        as_ids(getattr(source, "ids", None), length, name),
        from_value,
        class_names_of(source),
        getattr(source, "num_classes", None),
    )


def class_names_of(source: object) -> tuple[str, ...] | None:
    """Return the names in `classes`, which torchvision's data sets have too; None without."""
    names = getattr(source, "classes", None)
    if not isinstance(names, list | tuple) or not names:
        return None
    # ImageNet has several names for a class.
    return tuple(", ".join(name) if isinstance(name, tuple) else str(name) for name in names)


def _offers(value: object, attribute: str) -> bool:
    """Return whether an attribute exists, without computing it."""
    missing = object()
    return inspect.getattr_static(value, attribute, missing) is not missing


def as_ids(ids: object, length: int, name: str, prefix: str = "") -> Sequence[str]:
    """Return given ids, which are unique, else the numbers of the images after a prefix. Raises DataError."""
    if ids is None:
        return NumberedIds(prefix, length)
    given = list(cast(Sequence[object], ids))
    if len(given) != length:
        raise DataError(f"{name} holds {length} images but {len(given)} ids.")
    seen: set[str] = set()
    for one in given:
        if not isinstance(one, str):
            raise DataError(f"ids of {name} are strings, not {one!r} ({type(one).__name__}).")
        if one in seen:
            raise DataError(f"the id '{one}' of {name} stands for two images; ids are unique.")
        seen.add(one)
    return PackedIds(cast(list[str], given))
