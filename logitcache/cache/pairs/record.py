"""The record of a pairing: which image of a student belongs to which image of a cache, and what proves both.

A folder of four files: `rows` (int64 [N], the place of the paired image, -1 for none), `sizes` (int64 [N, 2], of the
teacher's images as its views decode them), `canaries` (uint8 [K, C, H, W]), all little endian, and `pairing.json`,
which is written last.
"""

import hashlib
import json
import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field, ValidationError
from torch import Tensor

from logitcache.cache.format.manifest import Manifest
from logitcache.cache.format.samples import read_sized
from logitcache.config.mistakes import first_mistake
from logitcache.config.recipe import Component
from logitcache.errors import CacheError, MismatchError, RecipeError
from logitcache.store.local import LocalStore
from logitcache.store.remote.client import is_remote
from logitcache.store.safe_files import parse_json
from logitcache.views.augmentations.base import Side
from logitcache.views.canaries import NUM_CANARIES, Canary
from logitcache.views.datasets import Dataset
from logitcache.views.datasets.base import Fingerprint, Sha256
from logitcache.views.keys import Draws, Ints
from logitcache.views.paired import UNPAIRED, Color

ROOT, ROWS, SIZES, CANARIES = "pairing.json", "rows", "sizes", "canaries"
FORMAT_VERSION = 1
MOST_BYTES = 1 << 20
NOTE = (
    "Proven: which images these are, their order, and the pixels of the views. Not proven: that two images of a pair "
    "show the same thing, at the same place in the picture. The ids alone say so; a control run with shuffled pairs "
    "shows what they are worth."
)
"""What a pairing cannot prove, as its record says it."""

Number = Annotated[int, Field(ge=0)]


class PairingRecord(Component):
    """What two data sets share by their ids.

    `seen` and `views` are the fingerprint of the cache's images and the digest of its views, `fingerprint` that of the
    paired images, `image_shape` the shape of their views; `rows` and `sizes` are digests of these files. `unmatched`
    images of the cache have no paired image, `unused` paired images no image of the cache, `doubled` ids stand for
    several; `other_labels` pairs have two labels, None if these cannot be compared.
    """

    dataset: Dataset | None
    fingerprint: Fingerprint
    seen: Fingerprint
    views: Sha256
    image_shape: tuple[Side, Side, Side]
    colors: Annotated[tuple[Color, ...], Field(max_length=64)] = ()
    unmatched: Number
    unused: Number
    doubled: Number
    other_labels: Number | None
    rows: Sha256
    sizes: Sha256
    canaries: Annotated[tuple[Canary, ...], Field(min_length=1, max_length=NUM_CANARIES)]
    versions: dict[str, str]

    def digest(self, without: Collection[str] = ()) -> str:
        """Return the sha256 of the record, as hex."""
        stored = self.model_dump(mode="json", exclude=set(without))
        return hashlib.sha256(json.dumps(stored, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Pairing:
    """A pairing as it was read: its record, the place of each paired image [N], and the sizes of the teacher's [N, 2].

    With `shuffled`, each image takes the place of another.
    """

    store: LocalStore
    record: PairingRecord
    rows: Ints
    sizes: Ints
    shuffled: bool = False

    @property
    def matched(self) -> Ints | None:
        """The images of the cache that have a paired one; None if all have."""
        return np.flatnonzero(self.rows != UNPAIRED) if self.record.unmatched else None

    @cached_property
    def sources(self) -> Ints:
        """The row of the cache [N] whose paired image learns from each row: the same, but for a control run.

        There the paired images move on by one in a keyed order: none keeps its own row.
        """
        sources = np.arange(len(self.rows))
        if self.shuffled:
            matched = np.flatnonzero(self.rows != UNPAIRED)
            words = Draws(0, np.zeros(len(matched), np.uint64), matched.astype(np.uint64)).words("shuffled_pairs", 0, 2)
            order = matched[np.lexsort((words[:, 1], words[:, 0]))]
            sources[order] = np.roll(order, 1)
        return sources

    def canary_pixels(self) -> Tensor:
        """Read the pixels of the canaries, [K, C, H, W]."""
        shape = (len(self.record.canaries), *self.record.image_shape)
        return torch.from_numpy(
            np.frombuffer(bytearray(read_sized(self.store, CANARIES, math.prod(shape))), np.uint8).reshape(shape)
        )

    def identity(self) -> dict[str, Any]:
        """Return what identifies the pairs that a run learns from, wherever the images lie."""
        return {
            "pairing": self.record.digest(without=("dataset", "canaries", "versions")),
            **({"shuffled": True} if self.shuffled else {}),
        }


def numbers_digest(numbers: Ints) -> str:
    """Return the sha256 of whole numbers as they are stored."""
    return hashlib.sha256(numbers.astype("<i8").tobytes()).hexdigest()


def write_pairing(folder: Path, record: PairingRecord, rows: Ints, sizes: Ints, pixels: Tensor) -> None:
    """Write a pairing, its record last. Raises RecipeError if another is there."""
    stored = {
        "format_version": FORMAT_VERSION,
        "note": NOTE,
        "pairing": record.model_dump(mode="json"),
        "sha256": record.digest(),
    }
    text, store = json.dumps(stored, indent=1).encode(), LocalStore(folder)
    if store.exists(ROOT) and not store.holds(ROOT, text):
        raise RecipeError(f"{folder} holds another pairing. Fix: another OUT, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    store.write(ROWS, rows.astype("<i8").tobytes())
    store.write(SIZES, sizes.astype("<i8").tobytes())
    store.write(CANARIES, pixels.numpy().tobytes())
    store.write(ROOT, text)


def open_pairing(location: str | Path, manifest: Manifest, where: str, *, shuffled: bool = False) -> Pairing:
    """Read the pairing of a cache; opens no image.

    Raises CacheError if it is missing or damaged, MismatchError if it was made for other images or views.
    """
    if is_remote(location):
        raise RecipeError(f"{location} is a URL; a pairing is a folder of this machine. Fix: copy it here")
    store = LocalStore(Path(location))
    record = _read_record(store)
    made_for = {"the images": (record.seen, manifest.fingerprint), "the views": (record.views, manifest.views.digest())}
    if other := [what for what, (then, now) in made_for.items() if then != now]:
        raise MismatchError(
            f"{store} pairs images with those of another cache than {where}: {' and '.join(other)} differ. "
            f"Fix: logitcache pair {where} --dataset … OUT"
        )
    count = manifest.num_images
    rows = np.frombuffer(read_sized(store, ROWS, 8 * count, record.rows), "<i8").astype(np.int64)
    sizes = np.frombuffer(read_sized(store, SIZES, 16 * count, record.sizes), "<i8").astype(np.int64)
    if manifest.views.decode == "full" and record.sizes != record.seen.sizes:
        raise _damaged(store, "its sizes are not those of the cache's images")
    if rows.min() < UNPAIRED or rows.max() >= record.fingerprint.num_images or sizes.min() < 1:
        raise _damaged(store, "its rows name images that are not there")
    if np.count_nonzero(rows == UNPAIRED) != record.unmatched or record.unmatched == count:
        raise _damaged(store, "its rows are not those that its record counts")
    if not all(
        0 <= canary.view < 1 << 32 and 0 <= canary.index < count and rows[canary.index] != UNPAIRED
        for canary in record.canaries
    ):
        raise _damaged(store, "a canary is of an image that is not there")
    return Pairing(store, record, rows, sizes.reshape(count, 2), shuffled)


def _read_record(store: LocalStore) -> PairingRecord:
    try:
        data = store.read(ROOT, MOST_BYTES)
    except FileNotFoundError as error:
        raise CacheError(
            f"{store} is no pairing: it has no {ROOT}. Fix: name a folder that `logitcache pair` has written"
        ) from error
    try:
        found = parse_json(data)
    except ValueError as error:
        raise _damaged(store, str(error)) from error
    if not isinstance(found, dict) or found.get("format_version") != FORMAT_VERSION:
        raise _damaged(store, f"it has another format than version {FORMAT_VERSION}")
    try:
        record = PairingRecord.model_validate_json(json.dumps(found.get("pairing")))
    except ValidationError as error:
        raise _damaged(store, first_mistake(error)) from error
    if found.get("sha256") != record.digest():
        raise _damaged(store, "its sha256 differs")
    return record


def _damaged(store: LocalStore, why: str) -> CacheError:
    return CacheError(f"{store}/{ROOT} is damaged: {why}. Fix: remove {store}, and run `logitcache pair` again")
