"""The images of a cache, for commands that look at them: opened, proved to be the same, rendered as the teacher saw."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from logitcache.cache.cache import Cache, open_cache
from logitcache.cache.predicted_classes import predicted_classes
from logitcache.cache.replay import require_releases, require_trusted
from logitcache.config.recipe import Component, load_recipe
from logitcache.errors import RecipeError
from logitcache.report.inspect import labels_as_seen
from logitcache.targets import Targets
from logitcache.views.datasets import Dataset
from logitcache.views.datasets.base import is_multi_label
from logitcache.views.datasets.custom import Custom
from logitcache.views.keys import ViewKey
from logitcache.views.spec import Views


class ImagesPlace(Component):
    """The data set as it is now, and which functions of the user's own code the views may call."""

    dataset: Dataset | None = None
    factories: tuple[str, ...] = ()


def locate_images(recorded: Dataset | None, overrides: Sequence[str]) -> ImagesPlace:
    """Apply overrides such as dataset.root=DIR to the data set that a cache, or a pairing, records."""
    theirs = recorded is None or isinstance(recorded, Custom)
    return load_recipe({} if theirs else {"dataset": recorded}, ImagesPlace, overrides)


def cache_images(path: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the data set of a cache as overrides give it, and the functions, as arguments of `Cache.views`."""
    if not overrides:
        return {}  # a recorded data set is opened under the rules for manifests
    place = locate_images(open_cache(path).manifest.dataset, overrides)
    return {"dataset": place.dataset, "factories": place.factories}


def views_as_seen(cache: Cache, overrides: Sequence[str] = (), trust: Collection[str] = ()) -> Views:
    """Bind the views that the teacher answered to their images. Raises as `Cache.views`; no answer is read."""
    spec, place = cache.manifest.views, locate_images(cache.manifest.dataset, overrides)
    require_trusted(spec, place.factories, cache.location)
    dataset = place.dataset if overrides else None  # a recorded data set is opened under the rules for manifests
    opened = cache.open_images(dataset, trust)
    cache.require_dataset(opened)
    require_releases(spec, "strict", cache.location)
    views = Views(opened, spec)
    cache.require_canaries(views)
    return views.answered()


def class_names(cache: Cache) -> tuple[str, ...]:
    """Return the names of the teachers' classes: of the images if recorded and as many, else of the models if known.

    Without either they are their numbers.
    """
    counts = {entry.num_classes for entry in cache.manifest.teachers.values() if entry.num_classes}
    names, count = cache.manifest.class_names, max(counts, default=0)
    if names is not None and len(names) == count:
        return names
    return predicted_classes(cache.manifest.teachers.values(), count) or tuple(map(str, range(count)))


def label_names(cache: Cache, key: ViewKey) -> tuple[str, ...]:
    """Name the classes of a view as the teacher saw it; none if it has no label."""
    label = labels_as_seen(cache, [key])[0]
    found = np.flatnonzero(label > 0) if label.ndim else [label] if label >= 0 else []
    names = cache.manifest.class_names
    return tuple(str(c) if names is None else names[c] for c in found)


def probabilities(cache: Cache, targets: Targets) -> NDArray[np.float32]:
    """Return a teacher's probabilities [B, C]: a softmax; a sigmoid by class if images are of any number of classes.

    Raises RecipeError if these need logits that are not kept.
    """
    if not is_multi_label(cache.labels):
        return targets.log_probs().exp().numpy()
    if not targets.keeps_logits:
        raise RecipeError(
            f"{cache.location} keeps no logits of images of any number of classes. Fix: a cache that keeps every logit "
            "(kind: dense, uint8, transform or head)"
        )
    return torch.sigmoid(targets.logits).numpy()
