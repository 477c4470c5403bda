"""Replay: what rendering the views of a cache needs, and proves: the images, code of others, recorded parameters."""

import json
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from importlib.metadata import version

import numpy as np
import torch

from logitcache.cache.format.manifest import Manifest
from logitcache.cache.format.samples import read_canaries, read_digests, read_labels, read_sizes
from logitcache.cache.read.row_sources import RecordedRows
from logitcache.config.trust import require_grant
from logitcache.errors import DataError, MismatchError, RecipeError, RefusedError, ReplayMismatchError
from logitcache.runtime.versions import versions
from logitcache.store.base import Store
from logitcache.store.shards import Shard
from logitcache.views import canaries
from logitcache.views.augmentations.foreign import factories_of, foreign_transforms
from logitcache.views.datasets import Dataset, open_dataset
from logitcache.views.datasets.arranged import ABSENT, ArrangedImages
from logitcache.views.datasets.base import ImageDataset, fingerprint
from logitcache.views.datasets.custom import Custom
from logitcache.views.datasets.fingerprint_diff import explain_difference, names_of
from logitcache.views.datasets.image_folder import ImageFolder
from logitcache.views.datasets.torchvision import Torchvision
from logitcache.views.datasets.webdataset import WebDataset
from logitcache.views.keys import ViewKey
from logitcache.views.spec import Views, ViewSpec

BLOCK = 4096
"""Keys planned at a time."""

_INSTEAD = "name the place of its images: `dataset:` in the recipe, --set dataset=…, or cache.loader(dataset=…)"

_FIX = (
    "Fix: replay the recorded parameters (replay: recorded), install the release of logitcache that made the cache, or "
    "precompute again"
)


def open_images(
    recorded: Dataset | None,
    num_images: int,
    where: str,
    dataset: object | None,
    identity: str,
    trust: Collection[str],
) -> ImageDataset:
    """Open a data set or its component; by default what a manifest `recorded`, if it has no risks or is granted.

    `identity` is the digest of the whole manifest, `where` its place. Raises RefusedError for what is not opened.
    """
    if dataset is not None:
        return open_dataset(dataset)
    if recorded is None or isinstance(recorded, Custom):
        raise RecipeError(
            f"{where} was made from a data set of the user's own code, and a cache never names code to "
            "run. Fix: give the data set: `dataset:` in the recipe, or cache.loader(dataset=…); "
            "for a validation cache, `validation.dataset:`"
        )
    require_grant(recorded.risks(), identity, trust, f"the data set of {where}", _INSTEAD)
    try:
        return _opened(recorded, num_images)
    except RefusedError:
        raise
    except DataError as error:
        raise DataError(
            f"{error}\n  {where} was made from images there. Fix, if they have moved: name the new place "
            "by `dataset:` in the recipe"
        ) from error


def _opened(recorded: Dataset, num_images: int) -> ImageDataset:
    """Open what a manifest names: nothing is downloaded, and no folder of far more files is walked to its end."""
    if isinstance(recorded, Torchvision):
        return recorded.model_copy(update={"download": False}).open()
    if isinstance(recorded, ImageFolder | WebDataset) and recorded.labelled:
        # The first release recorded `labelled` for unlabelled images too; the fingerprint holds the truth.
        recorded = recorded.model_copy(update={"labelled": None})
    return recorded.open(num_images) if isinstance(recorded, ImageFolder) else recorded.open()


def require_same_images(store: Store, manifest: Manifest, dataset: ImageDataset) -> None:
    """Raise MismatchError unless a data set has the images, order and labels that stage one saw.

    Images that are absent on purpose are not compared.
    """
    if isinstance(dataset, ArrangedImages) and len(dataset.absent):
        _require_those_there(store, manifest, dataset)
        return
    if fingerprint(dataset) != manifest.fingerprint:
        difference = explain_difference(manifest.fingerprint, read_digests(store, manifest), dataset)
        raise MismatchError(f"{store} was made from other images:\n{difference}")


def _require_those_there(store: Store, manifest: Manifest, dataset: ArrangedImages) -> None:
    there = np.flatnonzero(dataset.rows != ABSENT)
    pairs = {
        "content": (read_digests(store, manifest), dataset.digests()),
        "labels": (read_labels(store, manifest), dataset.labels),
        "sizes": (read_sizes(store, manifest), dataset.sizes()),
    }
    for what, (then, now) in pairs.items():
        if len(other := there[(then[there] != now[there]).reshape(len(there), -1).any(axis=1)]):
            raise MismatchError(
                f"{store} was made from other images: the {what} of {len(other)} differ: {names_of(dataset, other)}.\n"
                "  Fix: put back the original files, or precompute a new cache from the present ones"
            )


def require_canaries(
    store: Store, manifest: Manifest, views: Views, verify: canaries.Level, limits: canaries.DriftLimits
) -> None:
    """Raise ReplayMismatchError unless views rendered here are those that the teacher saw, within limits."""
    absent = views.dataset.absent if isinstance(views.dataset, ArrangedImages) else ()
    places = [place for place, canary in enumerate(manifest.canaries) if canary.index not in absent]
    known = [manifest.canaries[place] for place in places]
    if not known:
        raise MismatchError(f"{store}: none of the images that prove the pixels is left. Fix: put images back")
    report = canaries.compare(views, known, torch.from_numpy(read_canaries(store, manifest)[places]))
    may_replay = bool(manifest.parameters) and views.recorded is None and manifest.views.targets == "exact"
    name = f"{store}, spec {manifest.views.digest()[:8]}…"
    warning = canaries.judge(report, verify, canaries.Origin(name, manifest.versions, versions(), may_replay), limits)
    if warning:
        warnings.warn(warning, stacklevel=3)


def require_trusted(spec: ViewSpec, factories: Sequence[str], where: str) -> None:
    """Raise RecipeError for a function of the views that the user has not named: a cache never names code to run."""
    named = dict.fromkeys(factories_of(spec.augmentations))
    trusted = set(factories)  # of a text, its letters
    unknown = [factory for factory in named if factory not in trusted]
    if unknown:
        listed = json.dumps(unknown)
        raise RecipeError(
            f"the views of {where} call functions of a user's own code: {listed}. Fix: if you know them, name them: "
            f"`factories: {listed}` in the student's recipe, --set 'factories={listed}', or cache.loader(factories=…)"
        )


def require_releases(spec: ViewSpec, verify: canaries.Level, where: str) -> None:
    """Raise ReplayMismatchError, or warn if `verify` is numeric, for transforms locked to another torchvision.

    Canaries cannot prove these: what a transform draws is its own affair, and 32 views may not meet every branch of it.
    """
    here = version("torchvision")
    lines = [
        f"{used.what}: torchvision {used.torchvision}, here {here}"
        for used in foreign_transforms(spec.augmentations)
        if used.torchvision != here
    ]
    if not lines or verify == "off":
        return
    message = "\n  ".join([f"the views of {where} are locked to another release", *lines])
    if verify == "strict":
        raise ReplayMismatchError(
            f"{message}\n  Fix: install that release, accept what the canaries do not show with --verify numeric, or "
            "precompute again"
        )
    warnings.warn(message, stacklevel=4)


def require_replayable(manifest: Manifest, where: str) -> None:
    """Raise RecipeError or ReplayMismatchError if a cache has no parameters to replay in place of drawing them."""
    if manifest.views.targets == "linear":
        raise RecipeError(
            f"{where} has linear targets, which are mixed as planned, not as recorded. Fix: leave out replay: recorded"
        )
    if not manifest.parameters:
        why = "its views have none" if manifest.parameters is not None else "it was made without them"
        raise RecipeError(
            f"{where} keeps no parameters to replay: {why}. Fix: leave out replay: recorded; caches made with "
            "record_parameters: true have them"
        )
    here = manifest.views.columns()
    if manifest.parameters != here:
        raise ReplayMismatchError(
            f"{where} keeps the parameters {list(manifest.parameters)},\n  this release replays {list(here)}.\n"
            "  Fix: install the release of logitcache that made the cache"
        )


def require_planned(recorded: RecordedRows, columns: Sequence[str], views: Views, shards: Iterable[Shard]) -> None:
    """Raise ReplayMismatchError naming the first key of `shards` for which this release plans another row.

    `columns` names the recorded numbers.
    """
    spec = views.spec
    if tuple(columns) != spec.columns():
        raise ReplayMismatchError(
            f"the cache recorded the parameters {list(columns)}, this release plans {list(spec.columns())}. {_FIX}"
        )
    sizes, pairs = views.images.sizes(), views.pairs
    for keys in _blocks(shards):
        planned = spec.rows(keys, sizes[[key.index for key in keys]], pairs)
        found = recorded(keys)
        if not np.array_equal(planned, found):
            row, column = np.argwhere(planned != found)[0].tolist()
            view, index = keys[row]
            raise ReplayMismatchError(
                f"view {view} of image {views.dataset.ids[index]!r} (index {index}) is planned in another way: "
                f"{columns[column]} is {planned[row, column]} here, recorded is {found[row, column]}. {_FIX}"
            )


def _blocks(shards: Iterable[Shard]) -> Iterator[list[ViewKey]]:
    for shard in shards:
        for start in range(shard.start, shard.stop, BLOCK):
            yield [ViewKey(shard.view, index) for index in range(start, min(start + BLOCK, shard.stop))]
