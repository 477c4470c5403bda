"""Data sets: where images come from.

A new kind is a component in a file of its own; import it here and add it to the union.
"""

from typing import Annotated

from pydantic import Field

from logitcache.views.datasets.base import DatasetBase, ImageDataset
from logitcache.views.datasets.bundled import Bundled
from logitcache.views.datasets.custom import Custom, as_image_dataset
from logitcache.views.datasets.huggingface import HuggingFace
from logitcache.views.datasets.image_folder import ImageFolder
from logitcache.views.datasets.torchvision import Torchvision
from logitcache.views.datasets.webdataset import WebDataset

Dataset = Annotated[
    Bundled | Custom | HuggingFace | ImageFolder | Torchvision | WebDataset, Field(discriminator="kind")
]


def open_dataset(given: object) -> ImageDataset:
    """Open a recipe entry, or take the data set that Python code passed."""
    return given.open() if isinstance(given, DatasetBase) else as_image_dataset(given)
