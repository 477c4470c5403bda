"""The rows of a shard, and which targets are stored packed because hot ones would not fill whole pages."""

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

from logitcache.cache.format.arrays import PAGE
from logitcache.cache.format.layout import MOST_DECODED, SHARD_BYTES, Kept, kept_of
from logitcache.cache.format.manifest import LOGITS, StoredFeature, StoredLogits, TeacherEntry
from logitcache.errors import RecipeError
from logitcache.runtime.console import logger

S = TypeVar("S", StoredLogits, StoredFeature)

MAX_SHARD_ROWS, FEWEST_SHARDS, MOST_SHARD_ROWS = 65_536, 64, 1 << 20
"""Rows of a shard, unless there are so many images that a view has at least so many larger ones; and then."""
SHARDS_PER_VIEW, FEWEST_SHARD_ROWS = 16, 64
"""A stop drops the shard in progress: a view has at least so many, of at least so many rows, which fill a batch."""


def choose_shard_rows(entries: Sequence[TeacherEntry], num_images: int, asked: int | None) -> int:
    """Return the rows of a shard that are asked for, or choose them.

    A power of two, pages full for every hot array, and the largest array near 32 MiB.

    Shard files of a hot array map one after another into one address range only if each fills whole pages. From 8.4
    million images on shards grow with their number, so that a view has 64 to 128 of them if 32 MiB allow that: enough
    to be computed by many at a time, and few enough for one folder to hold those of all views. Of fewer images than a
    million a view has 16 to 31, if pages and `FEWEST_SHARD_ROWS` allow that: what is in progress when a run stops is
    lost.
    """
    if asked is not None:
        return asked
    kept = [kept_of(entry, target) for entry in entries for target in entry.targets]
    sizes = [(one.storage, row.num_bytes) for one in kept for row in one.rows]
    largest = max(size for _, size in sizes)
    step = max((PAGE // math.gcd(PAGE, size) for storage, size in sizes if storage == "hot"), default=1)
    rows = MAX_SHARD_ROWS
    while rows < MOST_SHARD_ROWS and 2 * rows * FEWEST_SHARDS <= num_images:
        rows *= 2
    most = max(FEWEST_SHARD_ROWS, num_images // SHARDS_PER_VIEW)
    while rows > step and (rows * largest > SHARD_BYTES or rows > most or rows // 2 >= num_images):
        rows //= 2
    return rows


def fit_to_pages(entries: Mapping[str, TeacherEntry], shard_rows: int) -> dict[str, TeacherEntry]:
    """Store packed each hot target that would not fill whole pages with shards of so many rows.

    Raises RecipeError if a packed shard would take too much memory to decode, or a table too much to read.
    """
    fitted = {name: _fit_to_pages(name, entry, shard_rows) for name, entry in entries.items()}
    for name, entry in fitted.items():
        for target in entry.targets:
            kept = kept_of(entry, target)
            # A head keeps no row of its own.
            most = MOST_DECODED // max((row.num_bytes for row in kept.rows), default=1)
            if kept.storage == "packed" and shard_rows > most:
                raise RecipeError(
                    f"shard_rows: {shard_rows} rows of {name}.{target} take more than {MOST_DECODED} bytes to decode. "
                    f"Fix: shard_rows: {most} at most"
                )
            for table, kept_as in kept.tables.items():
                if kept_as.num_bytes > MOST_DECODED:
                    raise RecipeError(
                        f"teachers.{name}.{target}: its table {table!r}, {kept_as.dtype} {list(kept_as.shape)}, takes "
                        f"more than {MOST_DECODED} bytes. Fix: fewer channels, or another kind"
                    )
    return fitted


def _fit_to_pages(name: str, entry: TeacherEntry, shard_rows: int) -> TeacherEntry:
    wrong = [target for target in entry.targets if not _fills_pages(kept_of(entry, target), shard_rows)]
    for target in wrong:
        logger.info(
            f"teachers.{name}: {target} is stored packed, as shards of {shard_rows} rows do not fill whole pages"
        )
    features = {
        target: _packed(stored) if target in wrong else stored for target, stored in entry.stored_features.items()
    }
    logits = _packed(entry.stored_logits) if entry.stored_logits and LOGITS in wrong else entry.stored_logits
    return entry.model_copy(update={"stored_features": features, "stored_logits": logits})


def _fills_pages(kept: Kept, shard_rows: int) -> bool:
    return kept.storage != "hot" or all(shard_rows * row.num_bytes % PAGE == 0 for row in kept.rows)


def _packed(stored: S) -> S:
    return stored.model_copy(update={"form": stored.form.model_copy(update={"storage": "packed"})})
