"""The images that a cache was made from: found where they are now, and proved to be the same."""

from collections.abc import Collection

from logitcache.cache.format.manifest import Manifest
from logitcache.cache.format.metadata import read_digests
from logitcache.config.trust import require_grant
from logitcache.errors import DataError, MismatchError, RecipeError, RefusedError
from logitcache.store.base import Store
from logitcache.views.datasets import Dataset, open_dataset
from logitcache.views.datasets.base import ImageDataset, fingerprint
from logitcache.views.datasets.custom import Custom
from logitcache.views.datasets.fingerprint_diff import explain_difference
from logitcache.views.datasets.image_folder import ImageFolder
from logitcache.views.datasets.torchvision import Torchvision
from logitcache.views.datasets.webdataset import WebDataset

_INSTEAD = "say where its images are: `dataset:` in the recipe, --set dataset=…, or cache.loader(dataset=…)"


def open_images(
    manifest: Manifest, where: str, dataset: object | None, identity: str, trust: Collection[str]
) -> ImageDataset:
    """Open a data set or its component; by default what stage one read, if it has no risks or is granted.

    `identity` is the digest of the whole cache's manifest. Raises RefusedError for what is not opened.
    """
    if dataset is not None:
        return open_dataset(dataset)
    recorded = manifest.dataset
    if recorded is None or isinstance(recorded, Custom):
        raise RecipeError(
            f"{where} was made from a data set of the user's own code, and a cache never names code to "
            "run. Fix: give the data set: `dataset:` in the recipe, or cache.loader(dataset=…); "
            "for a validation cache, `validation.dataset:`"
        )
    require_grant(recorded.risks(), identity, trust, f"the data set of {where}", _INSTEAD)
    try:
        return _opened(recorded, manifest.num_images)
    except RefusedError:
        raise
    except DataError as error:
        raise DataError(
            f"{error}\n  {where} was made from images there. Fix, when they have moved: say where they "
            "are now, `dataset:` in the recipe"
        ) from error


def _opened(recorded: Dataset, num_images: int) -> ImageDataset:
    """Open what a manifest names: nothing is downloaded, and no folder of far more files is walked to its end."""
    if isinstance(recorded, Torchvision):
        return recorded.model_copy(update={"download": False}).open()
    if isinstance(recorded, ImageFolder | WebDataset) and recorded.labelled:
        # The first release recorded this of images without labels too; the fingerprint tells them apart.
        recorded = recorded.model_copy(update={"labelled": None})
    return recorded.open(num_images) if isinstance(recorded, ImageFolder) else recorded.open()


def require_same_images(store: Store, manifest: Manifest, dataset: ImageDataset) -> None:
    """Raise MismatchError unless a data set has the images, order and labels that stage one saw."""
    if fingerprint(dataset) != manifest.fingerprint:
        difference = explain_difference(manifest.fingerprint, read_digests(store, manifest), dataset)
        raise MismatchError(f"{store} was made from other images:\n{difference}")
