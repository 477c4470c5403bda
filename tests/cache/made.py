"""Small data sets, teachers, recipes and caches for the tests of caches and of precompute."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from logitcache.cache.cache import Cache, open_cache
from logitcache.cache.format.arrays import ArrayLayout
from logitcache.cache.format.commits import Records
from logitcache.cache.format.manifest import _digest
from logitcache.cache.read.stored_array import StoredArray
from logitcache.cache.snapshot import open_snapshot
from logitcache.cache.verify import verify_cache
from logitcache.cache.write.writer import commit_record
from logitcache.config.recipe import load_recipe
from logitcache.logits import CompactLogits
from logitcache.stage_one.precompute import PrecomputeRecipe, PrecomputeResult, precompute
from logitcache.store.local import LocalStore
from logitcache.store.shards import Shard

COUNT = 300
"""Images of the sound cache: six shards of at most 128 rows."""

AGAIN = 3
"""Batches in which a teacher answers the canaries a second time."""

TRIED = 2 * 32
"""Images that a teacher takes before the first shard: each canary twice."""

DENSE16 = {"kind": "dense", "dtype": "float16"}
DENSE32 = {"kind": "dense", "dtype": "float32"}
PACKED = {"kind": "dense", "dtype": "float16", "storage": "packed"}
TOP2 = {"kind": "top_k", "k": 2}
TOP2_PACKED = {"kind": "top_k", "k": 2, "storage": "packed"}
UINT8 = {"kind": "uint8"}
PACKED_TOP2 = {"kind": "packed_top_k", "k": 2}
TRANSFORM = {"kind": "transform", "step": 0.1, "corrections": 3}
ENCODINGS = {
    "dense16": DENSE16,
    "dense32": DENSE32,
    "packed": PACKED,
    "top_k": TOP2,
    "top_k_packed": TOP2_PACKED,
    "uint8": UINT8,
    "packed_top_k": PACKED_TOP2,
    "transform": TRANSFORM,
}
FLIP_AND_CROP = [{"kind": "random_crop", "size": 4, "padding": 1}, {"kind": "horizontal_flip"}]


class Pixels:
    """Random images in memory, with labels or without."""

    def __init__(self, count: int, num_classes: int | None = None, side: int = 4, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        self.images = generator.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
        self.targets = None if num_classes is None else np.arange(count) % num_classes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        image = self.images[index]
        return image if self.targets is None else (image, int(self.targets[index]))


class Linear(nn.Module):
    """One matrix on the pixels: its answers do not depend on the size of the batch."""

    def __init__(self, num_classes: int = 16, side: int = 4, seed: int = 0, scale: float = 0.3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(3 * side * side, num_classes, generator=generator) * scale)

    def forward(self, images: Tensor) -> Tensor:
        return (images.flatten(1).double() @ self.weight.double()).float()


def recipe(cache: Path, **changes: Any) -> PrecomputeRecipe:
    """Return a recipe of one teacher `t`, changed by top-level keys."""
    plain = {
        "cache": str(cache),
        "views": {"num_views": 2, "seed": 3, "augmentations": FLIP_AND_CROP},
        "teachers": {"t": teacher()},
        "batch_size": 50,
        "num_workers": 0,
        "device": "cpu",
    }
    return load_recipe({**plain, **changes}, PrecomputeRecipe)


def teacher(logits: Mapping[str, Any] = DENSE16, **changes: Any) -> dict[str, Any]:
    return {"preprocessing": {"mean": [0.5] * 3, "std": [0.5] * 3}, "logits": dict(logits), **changes}


def run(cache: Path, images: object | None = None, module: nn.Module | None = None, **changes: Any) -> PrecomputeResult:
    """Precompute with the teacher `t`."""
    return precompute(recipe(cache, **changes), teachers={"t": module or Linear()}, dataset=images)


def made(cache: Path, logits: Mapping[str, Any] = DENSE16, count: int = 300, shard_rows: int | None = 128) -> Cache:
    """Make and open a cache of unlabelled random images."""
    run(cache, Pixels(count), teachers={"t": teacher(logits)}, shard_rows=shard_rows, batch_size=300)
    return open_cache(cache)


def write_images(root: Path, counts: Mapping[str, int], side: int = 4, seed: int = 0) -> Path:
    """Write PNG files into class folders."""
    generator = np.random.default_rng(seed)
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number:03d}.png")
    return root


def contents(root: Path) -> dict[str, bytes]:
    """Return the bytes of every file below a directory."""
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def stamps(root: Path) -> dict[str, tuple[int, ...]]:
    """Return what a write to a file or a folder would change."""
    found = {}
    for path in [root, *sorted(root.rglob("*"))]:
        status = os.lstat(path)
        found[str(path.relative_to(root))] = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return found


def shard_files(root: Path, name: str = "t.logits") -> list[Path]:
    return sorted((root / name).glob("c.*"))


def flip(path: Path, offset: int, mask: int = 0xFF) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= mask
    path.write_bytes(data)


def verified(path: Path) -> tuple[str, ...]:
    """Return what is wrong with a cache."""
    return verify_cache(open_snapshot(path)).problems


def stored_array(root: Path, array: ArrayLayout) -> StoredArray:
    """Return an array without a cache around it, of the shards whose files are there, committed as they are."""
    found = {}
    for view in range(array.num_views):
        for number in range(array.shards_per_view):
            start = number * array.shard_rows
            shard = Shard(view, start, min(start + array.shard_rows, array.num_images))
            if (root / array.file(shard)).exists():
                data = (root / array.file(shard)).read_bytes()
                found[array.number_of(shard)] = commit_record(memoryview(data), array.file(shard))
    values = np.frombuffer(b"".join(found.values()), np.uint8).reshape(len(found), -1)
    records = Records(array.num_views * array.shards_per_view, np.array(list(found), np.int64), values, {})
    return StoredArray(LocalStore(root), array, records, "Fix: none")


def mend(path: Path, **changes: Any) -> int:
    """Run precompute again on a copy of the sound cache; returns how many shards it wrote."""
    return run(path, Pixels(COUNT), shard_rows=128, **changes).shards_written


def forge(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest and sign it again, as an attacker would."""
    found = json.loads((path / "zarr.json").read_bytes())
    entry = found["attributes"]["logitcache"]
    change(entry["manifest"])
    entry["sha256"] = _digest(entry["manifest"])
    (path / "zarr.json").write_text(json.dumps(found))


def raw(logits: Any) -> Sequence[np.ndarray[Any, Any]]:
    """Return the stored numbers of decoded logits."""
    if isinstance(logits, Tensor):
        return [logits.numpy()]
    if isinstance(logits, CompactLogits):
        return [values.numpy() for values in logits.rows.values()]
    return [logits.log_p.numpy(), logits.index.numpy(), logits.tail.numpy()]
