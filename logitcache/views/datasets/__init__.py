"""Data sets: where images come from; each kind is one file, listed below."""

from typing import Annotated

from pydantic import Field

from logitcache.views.datasets.base import (
    Fingerprint,
    ImageDataset,
    fingerprint,
    pixel_digest,
)
from logitcache.views.datasets.bundled import Bundled
from logitcache.views.datasets.custom import Custom, as_image_dataset
from logitcache.views.datasets.fingerprint_diff import explain_difference
from logitcache.views.datasets.image_folder import ImageFolder
from logitcache.views.datasets.torchvision import Torchvision
from logitcache.views.datasets.webdataset import WebDataset

__all__ = [
    "Bundled",
    "Custom",
    "Dataset",
    "Fingerprint",
    "ImageDataset",
    "ImageFolder",
    "Torchvision",
    "WebDataset",
    "as_image_dataset",
    "explain_difference",
    "fingerprint",
    "open_dataset",
    "pixel_digest",
]

Dataset = Annotated[Bundled | Custom | ImageFolder | Torchvision | WebDataset, Field(discriminator="kind")]


def open_dataset(given: object) -> ImageDataset:
    """Open a recipe entry, or take the data set that Python code passed."""
    if isinstance(given, Bundled | Custom | ImageFolder | Torchvision | WebDataset):
        return given.open()
    return as_image_dataset(given)
