"""What stage one needs to know of images that it appends to a cache."""

from logitcache.cache.format.appended import Appended, appended_canaries
from logitcache.cache.format.manifest import Manifest
from logitcache.cache.format.manifest_diff import is_more
from logitcache.cache.format.samples import Samples, packed_ids
from logitcache.errors import MismatchError, RecipeError
from logitcache.views.datasets.arranged import ArrangedImages
from logitcache.views.datasets.base import ImageDataset
from logitcache.views.keys import ViewKey
from logitcache.views.spec import Views


def first_of(dataset: ImageDataset, count: int) -> ImageDataset:
    """Return the first images of a data set in the order of a cache; all of one that has so many, or another order."""
    return dataset.first(count) if isinstance(dataset, ArrangedImages) else dataset


def calibrated(views: Views, recorded: Manifest) -> Views:
    """Return the views that encodings are fitted to: those of the images that a cache began with."""
    dataset = first_of(views.dataset, recorded.first.num_images)
    return views if len(dataset.ids) == len(views.dataset.ids) else Views(dataset, views.spec)


def canary_keys(recorded: Manifest, num_images: int) -> list[ViewKey]:
    """Return the keys of the canaries of a cache, and of those among images that are appended to it."""
    known = [ViewKey(canary.view, canary.index) for canary in recorded.canaries]
    views = recorded.views
    chosen = appended_canaries(views.seed, recorded.first.num_images, num_images, views.num_views)
    return known + [key for key in chosen if key.index >= recorded.num_images]


def with_ids(samples: Samples, dataset: ImageDataset, recorded: Manifest) -> Samples:
    """Add the ids and sizes of images that are kept of a cache to which some are or were appended."""
    if recorded.appended is None and len(dataset.ids) == recorded.num_images:
        return samples
    return samples._replace(ids=packed_ids(dataset.ids), sizes=dataset.sizes())


def appended_of(recorded: Manifest, samples: Samples) -> Appended | None:
    """Return what a manifest records of images that a cache began with, if some are or were appended."""
    return None if samples.sizes is None else Appended(first=recorded.first, id_bytes=len(samples.ids))


def require_same_growth(growing: Manifest, wanted: Manifest, recorded: Manifest, where: str) -> None:
    """Raise MismatchError if another run began to append other images since the data set was opened."""
    is_begun = min(growing.num_images, wanted.num_images) > recorded.num_images
    if is_begun and growing.fingerprint != wanted.fingerprint:
        raise MismatchError(
            f"{where} is growing to {growing.num_images} images, and the data set has {wanted.num_images} of other "
            "content or order. Fix: run the same command again, if another run has begun meanwhile; else put the "
            f"images back, or give the growth up (`logitcache gc {where} --growth`)"
        )


def require_images_alone(recorded: Manifest, wanted: Manifest, where: str) -> None:
    """Raise RecipeError for a recipe that adds images and something else in one run."""
    if wanted.num_images <= recorded.num_images:
        return
    same_images = {key: getattr(recorded, key) for key in ("fingerprint", "appended", "canaries")}
    if is_more(wanted.model_copy(update=same_images), recorded):
        raise RecipeError(
            f"the recipe adds images to {where} and views, teachers or features as well, and one run adds one of both. "
            "Fix: run precompute first with the views and teachers that the cache has, then with the new ones"
        )
