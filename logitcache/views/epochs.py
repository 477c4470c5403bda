"""Stream the batches of an epoch: keys in order, rendered images, labels and targets."""

import itertools
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed
from torch.utils.data import Sampler

from logitcache.errors import RecipeError
from logitcache.targets import Batch, MixedLabels, Targets
from logitcache.views.checksums import require_rows
from logitcache.views.keys import Ints, Keys, ViewKey, columns_of, table_of
from logitcache.views.loader import StartMethod
from logitcache.views.mixing.mixing import MIXED_IMAGES_HELD_OUT, MIXED_VIEWS_PER_IMAGE
from logitcache.views.order import Drawn, share_of
from logitcache.views.resident import NumWorkers, open_loader
from logitcache.views.sampling import EveryImage, Sampling
from logitcache.views.spec import Views

TargetsOf = Callable[[Sequence[ViewKey]], Mapping[str, Targets]]
ChecksumsOf = Callable[[Sequence[ViewKey]], NDArray[np.uint32]]
EVERY_IMAGE = EveryImage()
CPU = torch.device("cpu")
_DRAWN = 1 << 14  # images whose keys are drawn at a time, a batch at least


def no_targets(keys: Sequence[ViewKey]) -> Mapping[str, Targets]:
    """Give no targets: for training on labels."""
    return {}


class LoaderOptions(TypedDict, total=False):
    """Options that `Cache.loader` passes on to `EpochLoader`, which has their defaults."""

    seed: int
    drop_last: bool
    views_per_image: int
    sampling: Sampling
    rank: int | None
    world_size: int | None
    start_method: StartMethod
    device: torch.device


class EpochSampler(Sampler[list[ViewKey]]):
    """The keys of each batch of a loader's current epoch; `set_epoch` is where Lightning looks for it."""

    def __init__(self, loader: "EpochLoader") -> None:
        self._loader = loader

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the loader's next pass."""
        self._loader.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[ViewKey]]:
        return self._loader.keys(self._loader.current_epoch)

    def __len__(self) -> int:
        return len(self._loader)


class EpochLoader:
    """Epochs of as many keys as there are images, in an order that is a function of labels, seed and epoch.

    `for batch in loader.epoch(e)` reads epoch e. `for batch in loader` reads the epoch that `set_epoch` chose, at first
    0: passes are not counted. Epoch e replays view e modulo the number of views. With `views_per_image` k, one decode
    serves k views: an epoch takes k views of every k-th image, and each k epochs together take k views of every image.
    Partners that are mixed with one another come together. Of several processes, `rank` of `world_size` takes its part
    of every batch of `batch_size`; by default those of torch.distributed, if it is initialised when an epoch starts.
    With `checksums_of`, every image that is rendered is compared. `images` are the indices to read, in order; by
    default all. `sampling` chooses among them those of an epoch: by default every one once. With `num_workers` "auto",
    images of a small set stay on `device`, and views are rendered there; others have two processes.
    """

    def __init__(
        self,
        views: Views,
        targets_of: TargetsOf = no_targets,
        checksums_of: ChecksumsOf | None = None,
        *,
        batch_size: int = 256,
        num_workers: NumWorkers = 0,
        seed: int = 0,
        drop_last: bool = False,
        views_per_image: int = 1,
        sampling: Sampling = EVERY_IMAGE,
        images: Ints | None = None,
        shuffle_block: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        start_method: StartMethod = "forkserver",
        device: torch.device = CPU,
    ) -> None:
        self.views = views
        self.batch_size, self.seed, self.drop_last = batch_size, seed, drop_last
        self.views_per_image, self._sampling = views_per_image, sampling
        sampling.require_possible(views.dataset, bool(views.spec.mixing))
        self._targets_of, self._checksums_of = targets_of, checksums_of
        self._block, self._given = shuffle_block, (rank, world_size)
        if images is not None and views.spec.mixing:
            raise RecipeError(MIXED_IMAGES_HELD_OUT)
        self._chosen, self._labels = images, views.dataset.labels if images is None else views.dataset.labels[images]
        self._num_images = len(self._labels)
        self.current_epoch, self._was_read, self._row_bytes = 0, False, 0
        self._images = open_loader(views, num_workers, start_method, device, checksums_of is not None)
        if len(self) == 0:
            raise RecipeError(
                f"drop_last leaves no batch: {self._num_images} images are fewer than batch_size {batch_size}. "
                "Fix: a smaller batch_size, or drop_last: false"
            )
        self._require_whole_units()
        self._require_shares(*self._share)

    def _require_whole_units(self) -> None:
        """Raise RecipeError if the views of an image cannot share a decode, or batches would cut them apart."""
        shared, spec = self.views_per_image, self.views.spec
        if not 1 <= shared <= spec.num_views:
            raise RecipeError(
                f"views_per_image is {shared}, but there are {spec.num_views} views. Fix: 1 to {spec.num_views}"
            )
        if shared > 1 and spec.mixing:
            raise RecipeError(MIXED_VIEWS_PER_IMAGE)
        if self.batch_size % self._unit:
            near = self.batch_size - self.batch_size % self._unit or self._unit
            what = "pairs that are mixed" if spec.mixing else "the views of an image"
            raise RecipeError(
                f"batch_size {self.batch_size} would cut {what} apart, and decode images twice. Fix: a multiple of "
                f"{self._unit}, such as {near}"
            )

    def _require_shares(self, rank: int, world_size: int) -> None:
        """Raise RecipeError if a process would have no part of a batch."""
        if not 0 <= rank < world_size:
            raise RecipeError(f"rank {rank} is not one of {world_size} processes, which count from 0")
        smallest = self.batch_size if self.drop_last else (self.images_per_epoch - 1) % self.batch_size + 1
        if -(-smallest // self._unit) < world_size:
            raise RecipeError(
                f"a batch of {smallest} images has no part for each of {world_size} processes. Fix: drop_last, or "
                "another batch_size, which is that of all processes together"
            )

    @property
    def _share(self) -> tuple[int, int]:
        """The rank of this process, and how many there are."""
        rank, world_size = self._given
        if rank is None and world_size is None and distributed.is_available() and distributed.is_initialized():
            return distributed.get_rank(), distributed.get_world_size()
        return rank or 0, 1 if world_size is None else world_size

    @property
    def _unit(self) -> int:
        """Keys that belong together: a pair, or the views of an image."""
        return 2 if self.views.spec.mixing else self.views_per_image

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return -(-self.images_per_epoch // self.batch_size)

    @property
    def images_per_epoch(self) -> int:
        """Images in an epoch, without those of a last batch that is dropped."""
        return self._num_images - self._num_images % self.batch_size * self.drop_last

    def keys(self, epoch: int, start: int = 0) -> Iterator[list[ViewKey]]:
        """Yield the keys of each batch of an epoch from batch `start` on; those of this process."""
        return map(list, self._keys(epoch, start))

    def _keys(self, epoch: int, start: int) -> Iterator[Keys]:
        rank, world_size = self._share
        self._require_shares(rank, world_size)
        unit = 2 if self.views.spec.mixing else 1
        order = self._sampling.order(self._labels, self.seed, epoch // self.views_per_image, self._block, unit)
        several = max(1, _DRAWN // self.batch_size) * self.batch_size
        for first in range(start * self.batch_size, self.images_per_epoch, several):
            drawn = np.stack(self._drawn(epoch, order, first, min(first + several, self.images_per_epoch)), axis=1)
            for batch in range(0, len(drawn), self.batch_size):
                rows = range(batch, min(batch + self.batch_size, len(drawn)))
                mine = share_of(rows, rank, world_size, self._unit)
                yield Keys(drawn[mine[0] : mine[-1] + 1])

    def _drawn(self, epoch: int, order: tuple[Drawn, Drawn], start: int, stop: int) -> tuple[Ints, Ints]:
        """Return views and images of a slice of an epoch."""
        count, shared, num_views = self._num_images, self.views_per_image, self.views.spec.num_views
        group, part = divmod(epoch, shared)
        slots = np.arange(part * count + start, part * count + stop)
        place = slots // shared
        images, repeats = (numbers[place[0] : place[-1] + 1][place - place[0]] for numbers in order)
        views = ((group + repeats) * shared + slots % shared) % num_views
        if self._chosen is not None:
            return views, self._chosen[images]
        pairs = self.views.pairs
        return views, images if pairs is None else pairs.images(views, images)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch, from batch `start` on."""
        return self._batches(self._keys(epoch, start))

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that `for batch in loader` reads next."""
        self.current_epoch, self._was_read = epoch, False

    @property
    def sampler(self) -> EpochSampler:
        """The keys of each batch of the current epoch, with `set_epoch`."""
        return EpochSampler(self)

    batch_sampler = sampler

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of the current epoch; warn if several views are there and it was read before."""
        num_views = self.views.spec.num_views
        if self._was_read and num_views > 1:
            warnings.warn(
                f"epoch {self.current_epoch} is read again: of {num_views} views, every pass without set_epoch replays "
                "the same, in the same order. Fix: loader.set_epoch(epoch) before each pass, or `for batch in "
                "loader.epoch(epoch)`",
                stacklevel=2,
            )
        return self._pass(self.epoch(self.current_epoch))

    def _pass(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        yield from itertools.islice(batches, 1)  # to look at one batch is not to read an epoch
        self._was_read = True
        yield from batches

    def targets(self, epoch: int) -> Iterator[tuple[list[ViewKey], Mapping[str, Targets]]]:
        """Yield keys and targets of each batch of an epoch, without images."""
        return ((keys, self._targets_of(keys)) for keys in self.keys(epoch))

    def _checked(self, keys: Sequence[ViewKey]) -> Sequence[ViewKey]:
        """Raise IndexError for a key that names no view, before anything is rendered."""
        views, images = self.views.spec.num_views, len(self.views.dataset.ids)
        if not keys:
            raise IndexError("a batch of no keys")
        own, indices = columns_of(keys)
        wrong = (own < 0) | (own >= views) | (indices < 0) | (indices >= images)
        if wrong.any():
            view, index = keys[int(wrong.argmax())]
            raise IndexError(f"there is no view {view} of image {index}: there are {views} views of {images} images")
        return keys

    def batches(self, batches: Iterable[Sequence[ViewKey]]) -> Iterator[Batch]:
        """Yield a batch per list of keys, for a sampler of the caller's own."""
        return self._batches(map(self._checked, batches))

    def _batches(self, batches: Iterable[Sequence[ViewKey]]) -> Iterator[Batch]:
        lengths: deque[list[int]] = deque()
        wanted, ahead = itertools.tee(self._blocks(batches, lengths))
        for images, keys in zip(self._images.render(ahead), wanted, strict=True):
            block = self._block_of(images, keys)
            self._row_bytes = -(-(images.nbytes + block.target_bytes) // len(keys))
            yield from block.split(lengths.popleft())

    def _blocks(self, batches: Iterable[Sequence[ViewKey]], lengths: deque[list[int]]) -> Iterator[Sequence[ViewKey]]:
        """Join the keys of batches that are made together, and append the lengths of each.

        The first is made alone: it shows what a row takes.
        """
        remaining = iter(batches)
        for first in remaining:
            room = self._images.together // (self._row_bytes * len(first)) if self._row_bytes else 0
            several = [first, *itertools.islice(remaining, max(0, room - 1))]
            lengths.append([len(batch) for batch in several])
            yield Keys(np.concatenate([table_of(batch) for batch in several])) if len(several) > 1 else first

    def _block_of(self, images: Tensor, keys: Sequence[ViewKey]) -> Batch:
        """Add labels and targets to rendered views."""
        if self._checksums_of is not None:
            require_rows(images, keys, self._checksums_of(keys), self.views.dataset.ids)
        labels, mixture, mixed = self.views.dataset.labels, self.views.mixture(keys, images.shape[2:]), None
        if mixture is not None:
            partners = torch.from_numpy(labels[mixture.partners])
            mixed = MixedLabels(partners, torch.from_numpy(mixture.share).float())
        table = table_of(keys)
        named = torch.from_numpy(table)
        return Batch(images, torch.from_numpy(labels[table[:, 1]]), named, self._targets_of(keys), mixed)
