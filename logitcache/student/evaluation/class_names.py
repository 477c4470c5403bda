"""Classes of the images to measure on: mapped to the model's, and in its order."""

import functools
import json
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from logitcache.errors import MismatchError, RecipeError, caught, raise_all
from logitcache.views.datasets.base import UNLABELLED, ImageDataset, is_multi_label
from logitcache.views.datasets.images.labels import SHOWN, class_index, listed_classes


def require_same_order(own: Sequence[str] | None, images: ImageDataset) -> None:
    """Raise MismatchError if the names of the images' classes are a model's `own` in another order."""
    names = images.class_names
    if own is None or names is None or tuple(own) == tuple(names) or sorted(own) != sorted(names):
        return
    first = next(place for place, (one, other) in enumerate(zip(own, names, strict=True)) if one != other)
    class_map = json.dumps({name: own.index(name) for name in names[:SHOWN]}, ensure_ascii=False)
    shown = class_map if len(names) <= SHOWN else f"{class_map[:-1]}, …}}"
    fix = "labels in the model's order" if is_multi_label(images.labels) else f"validation.class_map: {shown}"
    raise MismatchError(
        f"validation: the images are of the model's classes in another order: class {first} is {names[first]!r}, the "
        f"model's is {own[first]!r}.\n  Fix: {fix}"
    )


def mapped_labels(dataset: ImageDataset, class_map: Mapping[str, int], num_classes: int) -> NDArray[np.int64]:
    """Return the labels of a data set in the model's classes, [N]; -1 for images of classes that are not mapped.

    A key is the name of one of the data set's classes or, if none has that name, its index. Raises RecipeError for
    classes that are not there, on either side.
    """
    if is_multi_label(dataset.labels):
        raise RecipeError(
            "validation.class_map: the images are of any number of classes each, which are not mapped. "
            "Fix: leave it out, and validate on the model's classes"
        )
    wrong = {key: label for key, label in class_map.items() if not 0 <= label < num_classes}
    if wrong:
        raise RecipeError(
            f"validation.class_map: {wrong} are no classes of the model, which has {num_classes}. "
            f"Fix: 0 to {num_classes - 1}"
        )
    names, count = dataset.class_names or (), dataset.num_classes or 0
    # One more for images without a label, whose index -1 finds it.
    table = np.full(count + 1, UNLABELLED, np.int64)
    raise_all(caught(*(functools.partial(_index, key, names, count) for key in class_map)))
    for key, label in class_map.items():
        table[_index(key, names, count)] = label
    labels: NDArray[np.int64] = table[dataset.labels]
    if (labels == UNLABELLED).all():
        raise RecipeError("validation.class_map: no image is of a class that is mapped. Fix: map others")
    return labels


def _index(key: str, names: tuple[str, ...], count: int) -> int:
    try:
        return class_index(key, names, count)
    except ValueError as error:
        raise RecipeError(
            f"validation.class_map: {error} Fix: a name or an index of their {listed_classes(names, count)}"
        ) from None
