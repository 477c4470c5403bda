"""Augmentations: integer parameters planned from keys, applied to uint8 pixels; each kind is listed below."""

from typing import Annotated

from pydantic import Field

from logitcache.views.augmentations.base import Ints
from logitcache.views.augmentations.crops import CenterCrop, RandomCrop, RandomResizedCrop
from logitcache.views.augmentations.flip import HorizontalFlip
from logitcache.views.augmentations.resize import Resize

__all__ = ["Augmentation", "CenterCrop", "HorizontalFlip", "Ints", "RandomCrop", "RandomResizedCrop", "Resize"]

Augmentation = Annotated[
    Resize | CenterCrop | RandomCrop | RandomResizedCrop | HorizontalFlip, Field(discriminator="kind")
]
