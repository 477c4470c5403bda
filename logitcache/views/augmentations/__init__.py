"""Augmentations: integer parameters planned from keys, applied to uint8 pixels.

A new augmentation is a component in a file of its own; import it here and add it to the union.
"""

from typing import Annotated

from pydantic import Field

from logitcache.views.augmentations.blur import GaussianBlur
from logitcache.views.augmentations.color import ColorJitter, RandomGrayscale
from logitcache.views.augmentations.crops import CenterCrop, RandomCrop, RandomResizedCrop
from logitcache.views.augmentations.erasing import RandomErasing
from logitcache.views.augmentations.flip import HorizontalFlip
from logitcache.views.augmentations.foreign import Custom, Torchvision
from logitcache.views.augmentations.policies import RandAugment, TrivialAugmentWide
from logitcache.views.augmentations.resize import Resize

Augmentation = Annotated[
    Resize
    | CenterCrop
    | RandomCrop
    | RandomResizedCrop
    | HorizontalFlip
    | ColorJitter
    | RandomGrayscale
    | GaussianBlur
    | RandAugment
    | TrivialAugmentWide
    | RandomErasing
    | Torchvision
    | Custom,
    Field(discriminator="kind"),
]
