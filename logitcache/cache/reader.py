"""`Cache`: a finished cache, opened for training."""

import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from logitcache.cache.create import read_manifest
from logitcache.cache.layout import Layout, TeacherLayout, layout_of
from logitcache.cache.manifest import Manifest
from logitcache.cache.rows import PACKED_SHARDS, HotRows, PackedRows, RowSource
from logitcache.cache.skeleton import read_canaries, read_digests, read_labels, require_sound_skeleton
from logitcache.cache.verify import committed_shards, require_intact
from logitcache.errors import CacheError, DataError, MismatchError, RecipeError
from logitcache.targets import Targets
from logitcache.versions import versions
from logitcache.views import canaries
from logitcache.views.datasets import Custom, Torchvision, explain_difference, fingerprint, open_dataset
from logitcache.views.datasets.base import ImageDataset
from logitcache.views.epochs import EpochLoader
from logitcache.views.keys import ViewKey
from logitcache.views.loader import StartMethod
from logitcache.views.spec import Views


class Cache:
    """Targets of every view of every image, by key. Opening runs no code of the cache and writes nothing."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self.layout: Layout = layout_of(manifest)
        self.shards = committed_shards(path, self.layout)

    @property
    def num_views(self) -> int:
        """Views per image."""
        return self.layout.num_views

    def __len__(self) -> int:
        return self.layout.num_images

    @property
    def complete(self) -> bool:
        """Whether every shard is committed."""
        return len(self.shards) == self.layout.num_shards

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """Labels as stage one saw them, [N]; -1 where there is none."""
        return read_labels(self.path, self.manifest)

    @cached_property
    def _sources(self) -> dict[str, RowSource]:
        return {
            array.name: HotRows(self.path, array, self.shards)
            if array.storage == "hot"
            else PackedRows(self.path, array)
            for teacher in self.layout.teachers
            for array in teacher.arrays
        }

    def rows(self, keys: Sequence[ViewKey]) -> dict[str, Targets]:
        """Gather the targets of a batch of keys, by teacher, in the cache's dtypes."""
        pairs = np.array(keys, dtype=np.int64).reshape(-1, 2)
        views, indices = pairs[:, 0], pairs[:, 1]
        low, high = pairs.min(axis=0, initial=0), pairs.max(axis=0, initial=0)
        if min(low) < 0 or high[0] >= self.num_views or high[1] >= len(self):
            raise IndexError(
                f"keys run from {tuple(low.tolist())} to {tuple(high.tolist())}; the cache has {self.num_views} views "
                f"of {len(self)} images"
            )
        if not self.complete:
            self._require_committed(pairs)
        return {teacher.name: self._targets(teacher, views, indices) for teacher in self.layout.teachers}

    def _require_committed(self, pairs: NDArray[np.int64]) -> None:
        """Raise CacheError for a key of a shard that is not there: its addresses cannot be read."""
        rows = self.layout.shard_rows
        there = {(shard.view, shard.start // rows) for shard in self.shards}
        for view, index in pairs.tolist():
            if (view, index // rows) not in there:
                raise CacheError(
                    f"{self.path}: view {view} of image {index} is not committed yet. "
                    "Fix: finish `logitcache precompute`"
                )

    def _targets(self, teacher: TeacherLayout, views: NDArray[np.int64], indices: NDArray[np.int64]) -> Targets:
        arrays = {a: self._sources[a.name].take(views, indices) for a in teacher.arrays}
        tensors = {teacher.suffix(array): torch.from_numpy(rows) for array, rows in arrays.items()}
        return Targets(teacher.entry.logits.decode(tensors, teacher.entry.num_classes))

    def views(self, dataset: object | None = None, verify: canaries.Level = "strict") -> Views:
        """Bind the view specification to the images, wherever they are now, and prove that the pixels are the same.

        `dataset` is a data set or its component; by default the images are looked for where stage one read them.
        Raises MismatchError or ReplayMismatchError with the reason and the fix.
        """
        opened = self._open_dataset(dataset)
        self.require_dataset(opened)
        views = Views(opened, self.manifest.views)
        if verify != "off":
            self.require_canaries(views, verify)
        return views

    def require_dataset(self, dataset: ImageDataset) -> None:
        """Raise MismatchError unless a data set has the images, order and labels that stage one saw."""
        if fingerprint(dataset) != self.manifest.fingerprint:
            digests = read_digests(self.path, self.manifest)
            difference = explain_difference(self.manifest.fingerprint, digests, dataset)
            raise MismatchError(f"{self.path} was made from other images:\n{difference}")

    def require_canaries(self, views: Views, verify: canaries.Level = "strict") -> None:
        """Raise ReplayMismatchError unless views rendered here are those that the teacher saw."""
        pixels = torch.from_numpy(read_canaries(self.path, self.manifest))
        warning = canaries.judge(canaries.compare(views, self.manifest.canaries, pixels), verify, self._provenance())
        if warning:
            warnings.warn(warning, stacklevel=2)

    def _open_dataset(self, dataset: object | None) -> ImageDataset:
        if dataset is not None:
            return open_dataset(dataset)
        recorded = self.manifest.dataset
        if recorded is None or isinstance(recorded, Custom):
            raise RecipeError(
                f"{self.path} was made from a data set of the user's own code, and a cache never names code to run. "
                "Fix: give the data set: `dataset:` in the recipe, or cache.loader(dataset=…); "
                "for a validation cache, `validation.dataset:`"
            )
        if isinstance(recorded, Torchvision):
            recorded = recorded.model_copy(update={"download": False})  # opening a cache reaches for no network
        try:
            return recorded.open()
        except DataError as error:
            raise DataError(
                f"{error}\n  {self.path} was made from images there. Fix, when they have moved: say where they "
                "are now, `dataset:` in the recipe"
            ) from error

    def _provenance(self) -> str:
        recorded, here = self.manifest.versions, versions()
        changed = ", ".join(
            f"{key} {recorded.get(key)} -> {here[key]}" for key in here if here[key] != recorded.get(key)
        )
        return f"{self.path}, spec {self.manifest.views.digest()[:8]}; versions: {changed or 'as recorded'}"

    def loader(
        self,
        batch_size: int = 256,
        num_workers: int = 0,
        *,
        dataset: object | None = None,
        seed: int = 0,
        verify: canaries.Level = "strict",
        drop_last: bool = False,
        start_method: StartMethod = "forkserver",
    ) -> EpochLoader:
        """Stream batches of images and targets, once the images are proved to be those of the cache."""
        return EpochLoader(
            self.views(dataset, verify),
            self.rows,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            drop_last=drop_last,
            shuffle_block=self.shuffle_block,
            start_method=start_method,
        )

    @property
    def shuffle_block(self) -> int | None:
        """Rows to shuffle among where a packed view has more shards than are kept decoded; None for all."""
        packed = any(entry.logits.storage == "packed" for entry in self.manifest.teachers.values())
        if not packed or self.layout.shards_per_view <= PACKED_SHARDS:
            return None
        return PACKED_SHARDS // 2 * self.layout.shard_rows  # a batch at the seam of two blocks needs both


def open_cache(path: str | Path) -> Cache:
    """Open a finished cache; raise CacheError when it is damaged or incomplete.

    Every shard's stored bytes are compared with its commit record; files that this machine has compared before and that
    were not touched since are not read again.
    """
    root = Path(path)
    cache = Cache(root, read_manifest(root))
    require_sound_skeleton(root, cache.manifest)
    if not cache.complete:
        total = cache.layout.num_shards
        raise CacheError(
            f"{root} is incomplete: {total - len(cache.shards)} of {total} shards are not committed. "
            "Fix: run the same `logitcache precompute` command again, it continues"
        )
    require_intact(root, cache.layout, cache.shards)
    return cache
