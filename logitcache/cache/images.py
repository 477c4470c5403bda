"""The images that a cache was made from: found where they are now, and proved to be the same."""

from pathlib import Path

from logitcache.cache.copies import place_of
from logitcache.cache.manifest import Manifest
from logitcache.cache.skeleton import read_digests
from logitcache.errors import DataError, MismatchError, RecipeError
from logitcache.views.datasets import Custom, Torchvision, explain_difference, fingerprint, open_dataset
from logitcache.views.datasets.base import ImageDataset


def open_images(manifest: Manifest, where: str, dataset: object | None) -> ImageDataset:
    """Open a data set or its component; by default what stage one read, where that names no code."""
    if dataset is not None:
        return open_dataset(dataset)
    recorded = manifest.dataset
    if recorded is None or isinstance(recorded, Custom):
        raise RecipeError(
            f"{where} was made from a data set of the user's own code, and a cache never names code to "
            "run. Fix: give the data set: `dataset:` in the recipe, or cache.loader(dataset=…); "
            "for a validation cache, `validation.dataset:`"
        )
    if isinstance(recorded, Torchvision):
        recorded = recorded.model_copy(update={"download": False})  # opening a cache reaches for no network
    try:
        return recorded.open()
    except DataError as error:
        raise DataError(
            f"{error}\n  {where} was made from images there. Fix, when they have moved: say where they "
            "are now, `dataset:` in the recipe"
        ) from error


def require_same_images(root: Path, manifest: Manifest, dataset: ImageDataset) -> None:
    """Raise MismatchError unless a data set has the images, order and labels that stage one saw."""
    if fingerprint(dataset) != manifest.fingerprint:
        difference = explain_difference(manifest.fingerprint, read_digests(root, manifest), dataset)
        raise MismatchError(f"{place_of(root)} was made from other images:\n{difference}")
