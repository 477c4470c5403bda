"""Stream the batches of an epoch: keys in order, rendered images, labels and targets."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch

from logitcache.errors import RecipeError
from logitcache.targets import Batch, Targets
from logitcache.views.keys import ViewKey
from logitcache.views.loader import StartMethod, ViewLoader
from logitcache.views.order import epoch_order
from logitcache.views.spec import Views

TargetsOf = Callable[[Sequence[ViewKey]], Mapping[str, Targets]]


def no_targets(keys: Sequence[ViewKey]) -> Mapping[str, Targets]:
    """Give no targets: for training on labels."""
    return {}


class EpochLoader:
    """Epoch e replays view e modulo the number of views, in an order that is a function of seed and epoch."""

    def __init__(
        self,
        views: Views,
        targets_of: TargetsOf = no_targets,
        *,
        batch_size: int = 256,
        num_workers: int = 0,
        seed: int = 0,
        drop_last: bool = False,
        shuffle_block: int | None = None,
        start_method: StartMethod = "forkserver",
    ) -> None:
        self.views = views
        self.batch_size, self.seed, self.drop_last = batch_size, seed, drop_last
        self._targets_of, self._block = targets_of, shuffle_block
        self._images = ViewLoader(views, num_workers, start_method)
        if len(self) == 0:
            raise RecipeError(
                f"drop_last leaves no batch: {len(views.dataset.ids)} images are fewer than batch_size {batch_size}. "
                "Fix: a smaller batch_size, or drop_last: false"
            )

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        count = len(self.views.dataset.ids)
        return count // self.batch_size if self.drop_last else -(-count // self.batch_size)

    @property
    def images_per_epoch(self) -> int:
        """Images in an epoch, without those of a last batch that is dropped."""
        count = len(self.views.dataset.ids)
        return count - count % self.batch_size if self.drop_last else count

    def keys(self, epoch: int) -> Iterator[list[ViewKey]]:
        """Yield the keys of each batch of an epoch."""
        view = epoch % self.views.spec.num_views
        order = epoch_order(len(self.views.dataset.ids), self.seed, epoch, self._block)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            yield [ViewKey(view, index) for index in order[start : start + self.batch_size].tolist()]

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch, from batch `start` on."""
        return self.batches(itertools.islice(self.keys(epoch), start, None))

    def _checked(self, keys: list[ViewKey]) -> list[ViewKey]:
        """Raise IndexError for a key that names no view, before anything is rendered."""
        views, images = self.views.spec.num_views, len(self.views.dataset.ids)
        if not keys:
            raise IndexError("a batch of no keys")
        for view, index in keys:
            if not (0 <= view < views and 0 <= index < images):
                raise IndexError(
                    f"there is no view {view} of image {index}: there are {views} views of {images} images"
                )
        return keys

    def batches(self, batches: Iterable[list[ViewKey]]) -> Iterator[Batch]:
        """Yield a batch per list of keys, for a sampler of the caller's own."""
        wanted, ahead = itertools.tee(map(self._checked, batches))
        for images, keys in zip(self._images.render(ahead), wanted, strict=True):
            labels = self.views.dataset.labels[np.array([key[1] for key in keys])]
            yield Batch(images, torch.from_numpy(labels), torch.tensor(keys), self._targets_of(keys))
