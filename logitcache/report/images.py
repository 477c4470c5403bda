"""The images of a cache, for commands that look at them: opened, proved to be the same, rendered as the teacher saw."""

from collections.abc import Collection, Sequence
from typing import Any

from logitcache.cache.cache import Cache, open_cache
from logitcache.cache.replay import require_releases, require_trusted
from logitcache.config.recipe import Component, load_recipe
from logitcache.views.datasets import Dataset
from logitcache.views.datasets.custom import Custom
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
