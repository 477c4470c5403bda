"""What do caches of 10^8 and more row-views ask of one machine, and does the model count their files?

    python benchmarks/scale_metadata.py [--quick] [--json] [--folder DIR]

Simulated is ImageNet-1k x 79, 10^8 row-views; without --quick also ImageNet-22k x 90 and a billion x 4. The manifest,
the layout, all names and every commit record are real. Shard files hold real packed top-10 of random answers of 1000
classes, but those of an array are one file under many names: they take no disk, are in the page cache, and are hashed
under every name. Labels and digests of a billion images are mostly holes, and are not read.

Each step is done in a process of its own; beside a figure stand its CPU seconds and the peak of its memory, above what
the process had before. Exits 1 when a goal is missed; the bytes of memory by image are those that scale_model.py
reckons with.
"""

import hashlib
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from _harness import Row, parser_of, run_benchmark
from numpy.typing import NDArray
from read import manifest_of
from scale import TOP10, WITHIN, off
from scale_model import LABELS_BYTES, SKELETON_BYTES

from logitcache.cache.cache import Cache
from logitcache.cache.encodings.top_k import PackedTopK
from logitcache.cache.format.arrays import ArrayLayout
from logitcache.cache.format.layout import Layout, layout_of
from logitcache.cache.format.manifest import Manifest
from logitcache.cache.format.metadata import metadata_files, skeleton_problems
from logitcache.cache.format.root import read_manifest
from logitcache.cache.format.samples import read_labels
from logitcache.cache.format.shard_rows import choose_shard_rows
from logitcache.cache.snapshot import open_snapshot
from logitcache.cache.verify import verify_cache
from logitcache.cache.write.grow import begin_growth, finish_growth, forget_growth
from logitcache.cache.write.writer import ShardEncoder
from logitcache.planning.costs import StoreCost, skeleton_sizes, store_cost
from logitcache.runtime.console import configure
from logitcache.store.local import LocalStore
from logitcache.store.shards import Shard, seal

NUM_CLASSES = 1000
QUICK, FULL = ((1_281_167, 79),), ((1_281_167, 79), (14_197_122, 90), (1_000_000_000, 4))
MOST_IMAGES = 20_000_000
"""Of which labels and digests are written; those of more are holes after these."""

MANY_IMAGES = 10_000_000
"""Whose memory is more than what any cache takes."""

MOST_LINKS = 30_000
"""Names of one file; file systems allow twice as many."""

SETTLED = 2.2
"""Seconds after which a file that has not changed is remembered."""

LOST = 100
"""Each such record is lost before a run is resumed."""


class Took(NamedTuple):
    """What a step returned, and took: CPU seconds, and bytes of memory at its peak."""

    value: Any
    seconds: float
    memory: int

    def __str__(self) -> str:
        return f"{self.seconds:.2f} s, {self.memory / 1e6:,.0f} MB"


def took(step: Callable[..., Any], *arguments: Any) -> Took:
    """Do a step in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "logitcache.cache.cache", "logitcache.planning.plan"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_do, args=(sender, step, arguments))
    process.start()
    sender.close()
    found: Took = receiver.recv()
    process.join()
    return found


def _do(sender: Connection, step: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    configure(quiet=True)
    before, began = memory_of("VmRSS"), time.process_time()
    value = step(*arguments)
    sender.send(Took(value, time.process_time() - began, memory_of("VmHWM") - before))


def memory_of(name: str) -> int:
    """Return a figure of this process's memory in /proc, in bytes."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields[name].split()[0]) * 1024


class Shards:
    """Writes shards and their records; the bytes of those of one size are encoded once."""

    def __init__(self, root: Path, layout: Layout) -> None:
        self._root, self._layout = root, layout
        self._known: dict[tuple[str, int], tuple[Path, bytes, int]] = {}
        self._links: dict[tuple[str, int], int] = {}
        self._encoded = encoded_answers(min(layout.shard_rows, layout.num_images))
        for group in layout.groups:
            for name in (group.commits, *(array.name for array in group.arrays)):
                (root / name).mkdir(exist_ok=True)

    def write(self, shard: Shard) -> None:
        """Write one shard."""
        for group in self._layout.groups:
            records = [self._array(array, shard) for array in group.arrays]
            (self._root / group.record_file(shard)).write_bytes(b"".join(records))

    def _array(self, array: ArrayLayout, shard: Shard) -> bytes:
        rows, file = shard.stop - shard.start, self._root / array.file(shard)
        key = array.name, 1 if array.per_shard else rows
        self._links[key] = (self._links.get(key, MOST_LINKS) + 1) % (MOST_LINKS + 1)
        if self._links[key]:
            os.link(self._known[key][0], file)
        else:
            stored = ShardEncoder(array).encode(shard, self._rows(array, rows))
            file.write_bytes(stored)
            self._known[key] = file, hashlib.sha256(stored).digest(), stored.nbytes
        _, digest, size = self._known[key]
        return size.to_bytes(8, "little") + seal(digest, array.file(shard))

    def _rows(self, array: ArrayLayout, rows: int) -> NDArray[Any]:
        if array.per_shard:
            return np.random.default_rng(0).integers(0, 400, (1, *array.row_shape)).astype(array.dtype)
        return self._encoded[array.suffix][:rows]

    def packed(self, manifest: Manifest) -> dict[str, float]:
        """Return the bytes of a row after compression, by array, of the first shard."""
        layout = layout_of(manifest)
        return {
            array.name: (self._known[array.name, rows][2] - array.hot_bytes(0)) / rows
            for array in layout.arrays
            for rows in (1 if array.per_shard else min(layout.shard_rows, layout.num_images),)
        }


def encoded_answers(num_rows: int) -> dict[str, NDArray[Any]]:
    """Encode random answers, confident as real ones are."""
    generator, parts = torch.Generator().manual_seed(0), []
    for start in range(0, num_rows, 4096):
        logits = 3 * torch.randn(min(4096, num_rows - start), NUM_CLASSES, generator=generator)
        parts.append(PackedTopK(k=10).encode(logits))
    return {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}


def simulated(root: Path, images: int, views: int) -> Shards:
    """Write a cache; returns what writes its shards."""
    manifest, samples = manifest_of(TOP10, min(images, MOST_IMAGES), views, NUM_CLASSES)
    rows = choose_shard_rows(list(manifest.teachers.values()), images, None)
    fingerprint = manifest.fingerprint.model_copy(update={"num_images": images})
    manifest = manifest.model_copy(update={"fingerprint": fingerprint, "shard_rows": rows})
    for key, data in {**metadata_files(manifest), **samples.files()}.items():
        (root / key).parent.mkdir(parents=True, exist_ok=True)
        (root / key).write_bytes(data)
    for key, size in skeleton_sizes(manifest).items():
        os.truncate(root / key, size)
    shards = Shards(root, layout_of(manifest))
    for shard in layout_of(manifest).shards():
        shards.write(shard)
    return shards


def manifest_at(root: Path) -> Manifest:
    """Read the manifest of a cache."""
    return read_manifest(LocalStore(root))


def list_shards(root: Path) -> int:
    """Open a cache, but for the check of its skeleton; returns how many shards are committed."""
    return len(Cache(open_snapshot(root)).shards)


def check_skeleton(root: Path) -> None:
    """Compare all but the shards with the manifest, as the first opening does."""
    assert not list(skeleton_problems(LocalStore(root), manifest_at(root)))


def keep_labels(root: Path) -> int:
    """Read the labels as a student does."""
    return len(read_labels(LocalStore(root), manifest_at(root)))


def compare(root: Path) -> None:
    """Compare every shard with its record, as before training; what was compared before is remembered."""
    Cache(open_snapshot(root)).require_intact()


def verify(root: Path) -> int:
    """Read every byte again; returns how many problems there are."""
    return len(verify_cache(open_snapshot(root)).problems)


def resume(root: Path) -> int:
    """List what is to do; returns how many shards are."""
    snapshot = open_snapshot(root)
    done = set(snapshot.shards)
    return sum(shard not in done for shard in snapshot.layout.shards())


def grow(root: Path) -> None:
    """Let the root describe one view more, the shards of which are there."""
    snapshot = open_snapshot(root)
    finish_growth(snapshot.of(more(snapshot.manifest)), {})


def more(manifest: Manifest) -> Manifest:
    """Return the manifest of one view more."""
    views = manifest.views.model_copy(update={"num_views": manifest.views.num_views + 1})
    return manifest.model_copy(update={"views": views})


def counted(root: Path) -> tuple[int, int]:
    """Return the number of files and their bytes."""
    sizes = [os.lstat(Path(folder, name)).st_size for folder, _, names in os.walk(root) for name in names]
    return len(sizes), sum(sizes)


def cache_rows(root: Path, images: int, views: int) -> Iterator[Row]:
    """Simulate a cache, then open it, compare it, resume it, add a view and verify it."""
    shards, name = simulated(root, images, views), f"{images * views:.1e} row-views"
    manifest = manifest_at(root)
    layout = layout_of(manifest)
    listed = took(list_shards, root)
    yield Row(f"{name}: shards listed, off", abs(listed.value - layout.num_shards), 0, "", True, f"{listed}")
    yield from _stored_rows(root, name, shards, manifest)
    if MANY_IMAGES <= images <= MOST_IMAGES:
        for what, step, wanted in (("opening", check_skeleton, SKELETON_BYTES), ("labels", keep_labels, LABELS_BYTES)):
            found = took(step, root)
            yield Row(f"{name}: {what}, bytes an image", found.memory / images, 1.25 * wanted, "B", True, f"{found}")
    time.sleep(SETTLED)
    first, again = took(compare, root), took(compare, root)
    yield Row(f"{name}: compared again / at first", again.seconds / first.seconds, 0.5, "x", True, f"{first}; {again}")
    lost = [root / layout.groups[0].record_file(shard) for shard in list(layout.shards())[::LOST]]
    records = [file.read_bytes() for file in lost]
    for file in lost:
        file.unlink()
    resumed = took(resume, root)
    yield Row(f"{name}: shards to do, off", abs(resumed.value - len(lost)), 0, "", True, f"{len(lost)}: {resumed}")
    for file, record in zip(lost, records, strict=True):
        file.write_bytes(record)
    yield from _growth_rows(root, name, shards, manifest)
    if images * views < 2e8:
        found = took(verify, root)
        yield Row(f"{name}: problems found by verify", found.value, 0, "", True, f"{found}")


def _stored_rows(root: Path, name: str, shards: Shards, manifest: Manifest) -> Iterator[Row]:
    store, (files, size) = model(shards, manifest), counted(root)
    yield Row(f"{name}: files off", abs(files - store.files), 0, "", True, f"{store.files:,} files")
    yield Row(f"{name}: bytes off", off(size, store.bytes), WITHIN, "%", True, f"{store.bytes / 1e9:.1f} GB")


def _growth_rows(root: Path, name: str, shards: Shards, manifest: Manifest) -> Iterator[Row]:
    goal, before = more(manifest), counted(root)[0]
    begin_growth(LocalStore(root), goal, {})
    for shard in layout_of(goal).shards():
        if shard.view == manifest.views.num_views:
            shards.write(shard)
    grown = took(grow, root)
    forget_growth(LocalStore(root), goal)
    wanted = model(shards, goal).files - model(shards, manifest).files
    yield Row(f"{name}: files of one more view, off", abs(counted(root)[0] - before - wanted), 0, "", True, f"{grown}")


def model(shards: Shards, manifest: Manifest) -> StoreCost:
    """Return what the model says that a cache takes."""
    return store_cost(layout_of(manifest), shards.packed(manifest), skeleton_sizes(manifest))


def rows_of(folder: Path, quick: bool) -> Iterator[Row]:
    """Measure everything."""
    os.environ["XDG_CACHE_HOME"] = str(folder / "remembered")
    for images, views in QUICK if quick else FULL:
        with tempfile.TemporaryDirectory(dir=folder) as name:
            yield from cache_rows(Path(name), images, views)


def main() -> int:
    """Print each figure beside its goal."""
    return run_benchmark(parser_of(__doc__, "one cache", "where to put up to 300,000 small files"), rows_of, 52)


if __name__ == "__main__":
    sys.exit(main())
