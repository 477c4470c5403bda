"""Calibration: a teacher's answers to some views, drawn before the first shard, which encodings are fitted to."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from logitcache.models import Classifier
from logitcache.runtime.console import track
from logitcache.runtime.device import to_device
from logitcache.targets import Targets
from logitcache.teacher.precompute_recipe import PrecomputeRecipe
from logitcache.teacher.teacher import Teacher, require_finite
from logitcache.views.keys import Draws, ViewKey, below
from logitcache.views.loader import ViewLoader
from logitcache.views.spec import Views

ROWS, ROWS_PER_CLASS = 8192, 4
SHARE, FEWEST = 8, 256
"""Teachers answer at most one calibration row for so many rows of the cache, or the fewest."""

MAX_BYTES = 2 << 30
"""Of float32 logits: with very many classes there are fewer rows."""

PLACES = 4
"""Places of a map, or tokens, of which a row gives vectors of channels."""

RANKED = 1 << 22
"""Of more images than these a few are drawn, in place of ranking all."""


@dataclass(frozen=True)
class Calibration:
    """The sample of one teacher, which runs once, and only if an encoding is to be fitted.

    `most_rows` limits it, for an estimate; `recorded_rows` is the number of rows that a table was fitted to before.
    """

    recipe: PrecomputeRecipe
    views: Views
    teacher: Teacher
    examples: Targets
    most_rows: int | None = None
    recorded_rows: int | None = None

    @property
    def classifier(self) -> Classifier:
        """The teacher: its network, and which of the outputs are its classes."""
        return self.teacher.classifier

    @property
    def num_rows(self) -> int:
        """Rows of the whole cache."""
        return len(self.views.dataset.ids) * self.recipe.views.num_views

    @property
    def wanted_rows(self) -> int:
        """How many rows are drawn, unless the cache or `most_rows` has fewer."""
        return self.recorded_rows or rows_to_answer(self.examples.num_classes, self.num_rows)

    @property
    def logits(self) -> Tensor:
        """Logits, float32 [N, C] on the CPU."""
        return torch.cat([answers[0] for answers in self._answers])

    @property
    def images(self) -> Tensor:
        """The image that each row is a view of, int64 [N]."""
        return torch.tensor([key.index for key in self._keys])

    def vectors(self, feature: str) -> Tensor:
        """Return vectors of channels of a feature, float32 [M, C], at a few places of each row."""
        return torch.cat([answers[1][feature] for answers in self._answers])

    @cached_property
    def _keys(self) -> list[ViewKey]:
        spec, rows = self.recipe.views, self.wanted_rows
        rows = rows if self.most_rows is None else min(rows, self.most_rows)
        return calibration_keys(spec.seed, len(self.views.dataset.ids), spec.num_views, rows)

    @cached_property
    def _answers(self) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """The logits, and vectors of projected features, of every batch."""
        size, keys = self.recipe.batch_size, self._keys
        batches = [keys[start : start + size] for start in range(0, len(keys), size)]
        projected = [name for name, feature in self.teacher.features.items() if feature.channels is not None]
        with closing(ViewLoader(self.views.answered(), self.recipe.num_workers, self.recipe.start_method)) as loader:
            found = []
            images = track(loader.render(iter(batches)), f"calibrate {self.teacher.name}", len(batches), "batches")
            for batch, pixels in zip(batches, images, strict=True):
                found.append(self._answer(batch, pixels, projected))
        return found

    def _answer(self, keys: list[ViewKey], pixels: Tensor, projected: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        indices = [key.index for key in keys]
        labels = torch.from_numpy(self.views.dataset.labels[np.array(indices)])
        device = self.teacher.device
        answers = self.teacher(to_device(pixels, device), to_device(labels, device), keys)
        logits = answers.logits if answers.keeps_logits else torch.empty(len(keys), 0)
        require_finite(self.teacher, answers, [self.views.dataset.ids[index] for index in indices])
        vectors = {name: _vectors(answers.features[name]).cpu() for name in projected}
        return logits.cpu(), vectors


def _vectors(values: Tensor) -> Tensor:
    """Return vectors of channels [M, C] of a few places, others in each row, of [B, C], [B, N, D] or [B, C, H, W]."""
    if values.ndim == 2:
        return values
    places = values.flatten(2).transpose(1, 2) if values.ndim == 4 else values
    count = places.shape[1]
    rows, few = torch.arange(len(places))[:, None], torch.arange(min(PLACES, count))
    chosen = (rows + few * (count // len(few))) % count
    return places[rows, chosen].flatten(0, 1)


def num_calibration_rows(num_classes: int) -> int:
    """Return the number of calibration rows: several for each class, but no more than fit into memory."""
    wanted = max(ROWS, ROWS_PER_CLASS * num_classes)
    return min(wanted, max(1, MAX_BYTES // (4 * max(1, num_classes))))


def rows_to_answer(num_classes: int, num_rows: int) -> int:
    """Return how many rows a teacher computes to calibrate a cache of `num_rows`: fewer for a small one.

    Rows that a finished cache holds cost nothing: derive takes all `num_calibration_rows` of them.
    """
    return min(num_calibration_rows(num_classes), max(FEWEST, num_rows // SHARE))


def calibration_keys(seed: int, num_images: int, num_views: int, count: int) -> list[ViewKey]:
    """Choose up to `count` keys, sorted: as many images as there are, then further views of them."""
    if num_images <= RANKED:
        images = np.arange(num_images, dtype=np.uint64)
    else:
        tries = np.arange(2 * count, dtype=np.uint64)
        words = Draws(seed, np.zeros_like(tries), tries).words("calibration", 0, 2)
        images = np.unique((words[:, 0] << np.uint64(32) | words[:, 1]) % np.uint64(num_images))
    words = Draws(seed, np.zeros_like(images), images).words("calibration", 1, 2)
    order = np.argsort(words[:, 0], kind="stable")
    first = below(words[:, 1], num_views)
    return sorted(_rounds(images[order].tolist(), first[order].tolist(), num_views, count))


def _rounds(images: list[int], first: list[int], num_views: int, count: int) -> Iterator[ViewKey]:
    for number in range(num_views):
        for image, view in zip(images, first, strict=True):
            if count == 0:
                return
            count -= 1
            yield ViewKey((view + number) % num_views, image)
