"""Compare a cache's bytes with its commit records, its metadata with its manifest, and its images with its canaries."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zarr
from zarr.storage import LocalStore, MemoryStore

from logitcache.cache.create import CANARIES, DIGESTS, LABELS, skeleton_arrays
from logitcache.cache.layout import RECORD_BYTES, ArrayLayout, Layout, Shard, TeacherLayout
from logitcache.cache.manifest import Manifest
from logitcache.console import track
from logitcache.errors import CacheError
from logitcache.files import file_digests
from logitcache.views.canaries import pixel_digest

SHOWN = 5


class StoredShard(NamedTuple):
    """One array's bytes of one shard, and the record that commits them."""

    array: ArrayLayout
    shard: Shard
    record: bytes

    @property
    def size(self) -> int:
        """Stored bytes according to the record."""
        return int(np.frombuffer(self.record[:8], "<u8")[0])

    @property
    def name(self) -> str:
        """Return what a message calls it."""
        return f"{self.array.name} view {self.shard.view} rows {self.shard.start}..{self.shard.stop}"


@dataclass(frozen=True)
class Verification:
    """What was compared, and everything that is wrong."""

    shards: int
    bytes: int
    problems: tuple[str, ...]


def committed(root: Path, layout: Layout, shard: Shard) -> bool:
    """Tell whether every teacher's commit record of a shard is there."""
    return all((root / teacher.record_file(shard)).is_file() for teacher in layout.teachers)


def stored_shards(root: Path, teacher: TeacherLayout, shards: Sequence[Shard]) -> Iterator[StoredShard]:
    """Yield every array's part of every shard with its record; raise CacheError where a record is damaged."""
    for shard in shards:
        file = root / teacher.record_file(shard)
        try:
            records = file.read_bytes()
        except OSError as error:
            raise CacheError(f"{file}: {error.strerror}. Fix: run `logitcache precompute` again") from error
        if len(records) != RECORD_BYTES * len(teacher.arrays):
            raise CacheError(
                f"{file}: a commit record of {len(records)} bytes is damaged. Fix: run `logitcache precompute` again"
            )
        for number, array in enumerate(teacher.arrays):
            yield StoredShard(array, shard, records[number * RECORD_BYTES : (number + 1) * RECORD_BYTES])


def damaged(root: Path, layout: Layout, shards: Sequence[Shard], *, fresh: bool = False) -> dict[Shard, list[str]]:
    """Compare the stored bytes of committed shards with their records: what is wrong, by shard."""
    found: dict[Shard, list[str]] = {}
    for teacher in layout.teachers:
        readable = []
        for shard in shards:
            try:
                parts = list(stored_shards(root, teacher, [shard]))
            except CacheError as error:
                found.setdefault(shard, []).append(str(error))
                continue
            for part in parts:
                file = root / part.array.file(shard)
                size = file.stat().st_size if file.is_file() else None
                if size == part.size:
                    readable.append(part)
                else:
                    found.setdefault(shard, []).append(
                        f"{part.name}: {_size(size)}, its record says {part.size} ({file})"
                    )
        files = [root / part.array.file(part.shard) for part in readable]
        digests = file_digests(files, what="shard", fresh=fresh, error=CacheError)
        for part, digest in zip(readable, digests, strict=True):
            if digest != part.record[8:]:
                file = root / part.array.file(part.shard)
                found.setdefault(part.shard, []).append(f"{part.name}: its bytes differ from its record ({file})")
    return found


def _size(size: int | None) -> str:
    return "the file is missing" if size is None else f"{size} bytes"


def require_intact(root: Path, layout: Layout) -> None:
    """Raise CacheError naming the damaged shards of a complete cache."""
    lines = [line for problems in damaged(root, layout, list(layout.shards())).values() for line in problems]
    if lines:
        more = f"\n  and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
        raise CacheError(
            f"{root} is damaged:\n  "
            + "\n  ".join(lines[:SHOWN])
            + more
            + "\n  Fix: run the same `logitcache precompute` command again, it rewrites just these shards"
        )


def metadata_problems(root: Path, manifest: Manifest) -> Iterator[str]:
    """Compare each array's metadata with what the manifest implies."""
    group = zarr.create_group(MemoryStore())
    for options in skeleton_arrays(manifest):
        wanted = group.create_array(**options).metadata.to_dict()
        file = root / options["name"] / "zarr.json"
        try:
            found = json.loads(file.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            yield f"{file} cannot be read: {error}"
            continue
        if found != json.loads(json.dumps(wanted)):
            yield f"{file} does not describe the array that the manifest implies"


def check_metadata(root: Path, manifest: Manifest) -> None:
    """Raise CacheError when an array's metadata does not agree with the manifest."""
    problems = list(metadata_problems(root, manifest))
    if problems:
        raise CacheError(
            f"{root} is damaged:\n  "
            + "\n  ".join(problems[:SHOWN])
            + "\n  Fix: restore these files, or precompute again"
        )


def sample_problems(root: Path, manifest: Manifest) -> Iterator[str]:
    """Compare labels, image digests and canary pixels with the manifest."""
    expected: list[tuple[str, Any]] = [(LABELS, manifest.fingerprint.labels), (DIGESTS, manifest.fingerprint.content)]
    for name, digest in expected:
        values = _read(root, name)
        if values is None or hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest() != digest:
            yield f"{root / name}: its values differ from the manifest's digest"
    pixels = _read(root, CANARIES)
    for number, canary in enumerate(manifest.canaries):
        if pixels is None or pixel_digest(pixels[number]) != canary.augmented:
            yield f"{root / CANARIES}: the pixels of canary {number} differ from the manifest's digest"


def _read(root: Path, name: str) -> np.ndarray[Any, Any] | None:
    try:
        return np.asarray(zarr.open_array(LocalStore(root / name, read_only=True), mode="r")[...])
    except (ValueError, OSError, RuntimeError):
        return None


def verify_cache(root: Path, manifest: Manifest, layout: Layout) -> Verification:
    """Read every stored byte again and list everything that is wrong."""
    problems = list(metadata_problems(root, manifest)) + list(sample_problems(root, manifest))
    shards = list(layout.shards())
    present = [shard for shard in shards if committed(root, layout, shard)]
    problems += [f"view {s.view} rows {s.start}..{s.stop}: not committed" for s in shards if s not in set(present)]
    for lines in damaged(root, layout, list(track(present, "verify", len(present), "shards")), fresh=True).values():
        problems += lines
    return Verification(len(shards), stored_bytes(root), tuple(problems))


def stored_bytes(root: Path) -> int:
    """Add up the sizes of a cache's files."""
    return sum(file.stat().st_size for file in root.rglob("*") if file.is_file())
