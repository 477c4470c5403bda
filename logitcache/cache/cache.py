"""`Cache`: a finished cache, opened for training."""

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Unpack, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from logitcache.cache.format.layout import CHECKSUMS, PARAMETERS, Layout
from logitcache.cache.format.samples import read_labels
from logitcache.cache.image_order import Without, first_images, images_of
from logitcache.cache.pairs.paired_views import paired_views
from logitcache.cache.pairs.record import Pairing, open_pairing
from logitcache.cache.read.gather import StoredRows
from logitcache.cache.read.row_sources import RecordedRows, num_kept
from logitcache.cache.read.target_codecs import TargetCodecs
from logitcache.cache.replay import (
    open_images,
    require_canaries,
    require_planned,
    require_releases,
    require_replayable,
    require_same_images,
    require_trusted,
)
from logitcache.cache.snapshot import Snapshot
from logitcache.cache.verify import open_committed
from logitcache.errors import RecipeError
from logitcache.logits import LinearLogits
from logitcache.reductions import FeatureShape
from logitcache.targets import Targets
from logitcache.views import canaries
from logitcache.views.datasets.base import ImageDataset, Labels
from logitcache.views.epochs import ChecksumsOf, EpochLoader, LoaderOptions
from logitcache.views.keys import ViewKey
from logitcache.views.resident import NumWorkers
from logitcache.views.spec import Views

Replay = Literal["planned", "recorded"]
"""Source of the parameters of augmentations: drawn again from the seed, or read from the cache."""

FILES_COMPARED = 1024
"""A cache of more shard files than these is compared view by view, as they are read."""


class Cache:
    """The targets of every view of every image, by key. Opening one runs no code from it and writes nothing to it."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.path = snapshot.store.path  # the folder in which it is read
        self.location = str(snapshot.store)  # the same, or a URL
        self.manifest = snapshot.manifest
        self.layout: Layout = snapshot.layout
        self.shards = snapshot.shards
        self._stored = StoredRows(snapshot)
        self._codecs = TargetCodecs(snapshot.store, self.manifest, self.layout)

    @property
    def num_views(self) -> int:
        """Views per image."""
        return self.layout.num_views

    def __len__(self) -> int:
        return self.layout.num_images

    def __repr__(self) -> str:
        images = f"{len(self)} images × {self.num_views} views of {list(self.manifest.image_shape)}"
        targets = ", ".join(f"{name}: {' + '.join(kept)}" for name, kept in self.manifest.targets.items())
        committed = "" if self.complete else f"; {len(self.shards)} of {self.layout.num_shards} shards are committed"
        return f"<Cache {self.location!r}: {images}; {targets}{committed}>"

    @property
    def complete(self) -> bool:
        """Whether every shard is committed."""
        return self.snapshot.complete

    @cached_property
    def labels(self) -> Labels:
        """Labels as stage one saw them, int64 [N] or, multi-hot, int8 [N, C]; -1 if there is none."""
        return read_labels(self.snapshot.store, self.manifest)

    @cached_property
    def _recorded(self) -> dict[str, RecordedRows]:
        return {array.suffix: RecordedRows(self.snapshot.array(array)) for array in self.layout.views_arrays}

    def only(self, targets: Mapping[str, Collection[str]], num_views: int | None = None) -> "Cache":
        """Return the same cache with some targets of some teachers, and the first views; nothing else is read.

        `targets` maps a teacher's name to "logits" and names of features. Raises RecipeError for any other.
        """
        for name, wanted in targets.items():
            missing = sorted(set(wanted) - set(self.manifest.targets.get(name, ())))
            if missing or name not in self.manifest.teachers:
                raise RecipeError(
                    f"{self.location} has no {missing or 'targets'} of teacher {name!r}, but {self.manifest.targets}. "
                    "Fix: name what it has, or add it with precompute"
                )
        return Cache(self.snapshot.of(self.manifest.restricted(num_views or self.num_views, targets)))

    def first(self, num_images: int) -> "Cache":
        """Return the same cache with as many images as it had once; raise MismatchError for more, or for fewer."""
        return Cache(self.snapshot.of(first_images(self.snapshot.store, self.manifest, num_images)))

    def features(self, teacher: str) -> dict[str, FeatureShape]:
        """Return kind and shape of the stored features of a teacher, by name."""
        entry = self.manifest.teachers[teacher]
        return {
            name: FeatureShape(entry.features[name].kind, stored.shape)
            for name, stored in entry.stored_features.items()
        }

    def head(self, teacher: str) -> tuple[Tensor, Tensor] | None:
        """Return weight [C, D] and bias [C] of a teacher's last layer, if its logits are stored as its input."""
        return self._codecs.head(teacher)

    def answers(self, keys: Sequence[ViewKey]) -> dict[str, Targets]:
        """Gather the targets of each teacher for the views of keys."""
        rows = self.layout.shard_rows
        return self._codecs.targets(
            self._stored.rows(keys), lambda row: self.layout.shard(keys[row].view, keys[row].index // rows)
        )

    def rows(self, keys: Sequence[ViewKey]) -> dict[str, Targets]:
        """Gather the targets of a batch of keys, by teacher: its outputs, or linear mixtures of its logits."""
        own, spec = self.answers(keys), self.manifest.views
        if spec.targets == "exact":
            return own
        _, height, width = self.manifest.image_shape
        mixture = spec.mixture(keys, self.manifest.partners(spec), (height, width))
        assert mixture is not None
        views = [view for view, _ in keys]
        partners = self.answers(list(map(ViewKey, views, mixture.partners.tolist())))
        share = torch.from_numpy(mixture.share).float()
        return {name: Targets(LinearLogits(own[name].compact, partners[name].compact, share)) for name in own}

    def as_dask(self) -> dict[str, dict[str, Any]]:
        """Return all targets as Dask arrays by teacher and target: float32 [V, N, ...], one chunk per shard.

        Logits are those of the views as the teacher saw them; if only a distribution is kept (top-k), its
        log-probabilities. A shard is read, compared with its record and decoded when its chunk is computed.
        """
        from logitcache.cache.read.dask_arrays import as_dask  # which imports Dask: training needs none of it

        return as_dask(self.snapshot)

    def row_checksums(self, keys: Sequence[ViewKey]) -> NDArray[np.uint32] | None:
        """Gather the checksums [B] of the pixels that the teachers saw; None if none are recorded."""
        self._stored.places(keys)
        return self._recorded[CHECKSUMS](keys) if self.manifest.row_checksums else None

    def checksums_of(self, verify: canaries.Level) -> ChecksumsOf | None:
        """Return the checksums to compare every image with; None if none are recorded, or if pixels may differ."""
        return self._recorded[CHECKSUMS] if self.manifest.row_checksums and verify == "strict" else None

    def parameters(self, keys: Sequence[ViewKey]) -> NDArray[np.int64] | None:
        """Gather what the augmentations drew, [B, P], as the manifest names it; None if it is not recorded."""
        self._stored.places(keys)
        if not self.manifest.parameters:
            return None if self.manifest.parameters is None else np.empty((len(keys), 0), np.int64)
        return self._recorded[PARAMETERS](keys)

    def require_intact(self) -> None:
        """Raise CacheError naming the committed shards whose stored bytes differ from their records."""
        self._stored.compare()

    def views(
        self,
        dataset: object | None = None,
        verify: canaries.Level = "strict",
        limits: canaries.DriftLimits = canaries.DEFAULT_LIMITS,
        replay: Replay = "planned",
        factories: Sequence[str] = (),
        trust: Collection[str] = (),
        pairing: Pairing | None = None,
    ) -> Views:
        """Bind the view specification to the images, wherever they are now, and verify that the pixels are the same.

        `dataset` is a data set or its component; by default that of stage one or, with a `pairing`, that of `pair`.
        `factories` names the functions of the user's own code that the views may call, `trust` the digests of caches
        that may name images at URLs (`logitcache.config.trust`). Raises MismatchError, ReplayMismatchError or
        RefusedError with the reason and the fix.
        """
        for name, value, known in (("verify", verify, canaries.Level), ("replay", replay, Replay)):
            if value not in get_args(known):
                raise RecipeError(f"{name} is {value!r}. Fix: one of {', '.join(get_args(known))}")
        require_trusted(self.manifest.views, factories, self.location)
        if self.snapshot.store.is_local:  # shards of a remote cache are compared as they are downloaded
            self.require_intact()
        if replay == "recorded":
            require_replayable(self.manifest, self.location)
        recorded = self._recorded[PARAMETERS] if replay == "recorded" else None
        if pairing is not None:
            return paired_views(self, pairing, dataset, verify, limits, recorded, trust)
        opened = self.open_images(dataset, trust)
        self.require_dataset(opened)
        require_releases(self.manifest.views, verify, self.location)
        views = Views(opened, self.manifest.views, recorded)
        if verify != "off":
            self.require_canaries(views, verify, limits)
        return views

    def open_images(
        self, dataset: object | None = None, trust: Collection[str] = (), without: Without = ()
    ) -> ImageDataset:
        """Open a data set or its component, by default what stage one read, in the order of a cache that has grown."""
        manifest = self.manifest
        identity, count = self.snapshot.identity, manifest.num_images
        images = open_images(manifest.dataset, count, self.location, dataset, identity, trust)
        return images_of(self.snapshot.store, manifest, images, without)

    def pairing(self, location: str | Path, *, shuffled: bool = False) -> Pairing:
        """Read a pairing that `pair` wrote for this cache; `shuffled` gives each image the targets of another."""
        return open_pairing(location, self.manifest, self.location, shuffled=shuffled)

    def require_dataset(self, dataset: ImageDataset) -> None:
        """Raise MismatchError unless a data set has the images, order and labels that stage one saw."""
        require_same_images(self.snapshot.store, self.manifest, dataset)

    def require_canaries(
        self,
        views: Views,
        verify: canaries.Level = "strict",
        limits: canaries.DriftLimits = canaries.DEFAULT_LIMITS,
    ) -> None:
        """Raise ReplayMismatchError unless views rendered here are those that the teacher saw, within limits."""
        require_canaries(self.snapshot.store, self.manifest, views, verify, limits)

    def require_parameters(self, views: Views) -> None:
        """Raise ReplayMismatchError unless every key is planned as the cache recorded it, if it did."""
        columns = self.manifest.parameters
        if columns:
            require_planned(self._recorded[PARAMETERS], columns, views, self.shards)

    def loader(
        self,
        batch_size: int = 256,
        num_workers: NumWorkers = 0,
        *,
        dataset: object | None = None,
        verify: canaries.Level = "strict",
        limits: canaries.DriftLimits = canaries.DEFAULT_LIMITS,
        replay: Replay = "planned",
        factories: Sequence[str] = (),
        trust: Collection[str] = (),
        pairing: Pairing | None = None,
        **options: Unpack[LoaderOptions],
    ) -> EpochLoader:
        """Return a loader of batches of images and targets, after verifying that the images are those of the cache.

        `dataset` to `pairing` as for `views`; the further options are those of `EpochLoader`.
        """
        return EpochLoader(
            self.views(dataset, verify, limits, replay, factories, trust, pairing),
            self.rows,
            self.checksums_of(verify) if pairing is None else None,
            images=None if pairing is None else pairing.matched,
            batch_size=batch_size,
            num_workers=num_workers,
            shuffle_block=self.shuffle_block,
            **options,
        )

    @property
    def shuffle_block(self) -> int | None:
        """Rows to shuffle among if a packed view has more shards than are kept decoded; None for all.

        It depends on the cache alone, not on a machine's memory: so does the order of an epoch.
        """
        packed = [array for group in self.layout.targets for array in group.rows if array.storage == "packed"]
        kept = min(map(num_kept, packed), default=self.layout.shards_per_view)
        if self.layout.shards_per_view <= kept:
            return None
        return kept // 2 * self.layout.shard_rows  # a batch at the seam of two blocks needs both


def open_cache(path: str | Path) -> Cache:
    """Open a finished cache in a folder or at a URL; raise CacheError if it is damaged or incomplete.

    Stored bytes are compared with their commit records: for a small cache on opening, for a larger one before its rows
    are first read, and completely before its views are rendered. Files that this machine has compared before and that
    have not changed are not read again, nor are the records of a large, unchanged cache in a folder. Files at a URL are
    compared as they are downloaded.
    """
    cache = open_uncompared(path)
    if cache.snapshot.store.is_local and cache.layout.num_shards * len(cache.layout.arrays) <= FILES_COMPARED:
        cache.require_intact()
    return cache


def open_uncompared(path: str | Path) -> Cache:
    """Open a finished cache of which some targets are used; none is compared before `only` has named them."""
    return Cache(open_committed(path))
