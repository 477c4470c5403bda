"""Images of any number of classes each: what is worn where, of bundled clothes."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from logitcache.models import Classifier, SmallCNN
from logitcache.views.datasets import Bundled, open_dataset
from tests.student.small import GREY, NUM_IMAGES, fill

CLASSES = ("top", "sleeves", "below", "foot", "coat")
_WORN = np.array(
    [
        [1, 0, 0, 0, 0],  # T-shirt
        [0, 0, 1, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 0, 1, 0, 0],  # dress
        [1, 1, 0, 0, 1],
        [0, 0, 1, 1, 0],  # sandal
        [1, 1, 0, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0],  # bag
        [0, 0, 1, 1, 0],
    ],
    np.int8,
)


class Attributes:
    """Bundled images; of every fifth one class is unknown, of every seventh all are."""

    classes = CLASSES

    def __init__(self, split: str = "train", num_images: int = NUM_IMAGES) -> None:
        self._images = open_dataset(Bundled.model_validate({"split": split, "num_images": num_images}))
        self.table = _WORN[self._images.labels]
        self.table[::5, 1] = -1
        self.table[::7] = -1

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor | None]:
        known = bool((self.table[index] >= 0).any())
        return self._images.read(index), torch.from_numpy(self.table[index]).float() if known else None


class Nameless(Attributes):
    classes = ()


def attributes() -> Attributes:
    """A factory."""
    return Attributes()


def few_attributes() -> Attributes:
    """A factory."""
    return Attributes("test", 100)


MANY = {"kind": "custom", "factory": "tests.student.attributes:attributes"}
TEST_MANY = {"kind": "custom", "factory": "tests.student.attributes:few_attributes"}
BOTH = [{"kind": "multi_label_kl", "temperature": 2.0}, {"kind": "binary_cross_entropy", "weight": 0.5}]


@functools.cache
def network(seed: int = 1) -> nn.Module:
    """A network that has learnt a little of the attributes."""
    images = Attributes()
    pixels = torch.stack([images[index][0] for index in range(len(images))])
    labels = torch.from_numpy(images.table).float()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        classifier = Classifier(SmallCNN(width=4).build(len(CLASSES), 1).module, GREY)
        optimizer = torch.optim.Adam(classifier.parameters(), 0.02)
        for _ in range(12):
            losses = nn.functional.binary_cross_entropy_with_logits(
                classifier.train()(pixels), labels.clamp(min=0), reduction="none"
            )
            losses[labels >= 0].mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return classifier.module.eval()


def fill_many(path: Path, **changes: Any) -> Path:
    """Fill a cache of a teacher of attributes."""
    teachers = changes.pop("teachers_by_name", None) or {"net": network()}
    return fill(path, teachers, **({"images": MANY} | changes))
