"""How fast does a cache give its rows, against np.memmap, LMDB and zarrs?

    python benchmarks/read.py [--quick] [--json] [--folder DIR]

Random batches of 256 keys from one view of 1.28 M images, top-10 and dense float16 logits of 1000 classes (2.56 GB;
with --quick 320,000 images, 0.64 GB). `np.memmap` reads the same arrays as plain files, one `.take` each. Both take
turns; a figure is the median over the rounds of a ratio: of CPU times where everything is in memory, else of times by
the clock. Cold reads begin with files that are not in the page cache, and a fresh mapping. The cache that is opened has
300 views of 1.28 M images in sparse files, and was opened before. LMDB and zarrs are left out where they are not
installed. Exits 1 when a goal is missed.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from _harness import Row, Work, alternate, parser_of, run_benchmark, seconds
from numpy.typing import NDArray

from logitcache.cache.cache import Cache, open_cache
from logitcache.cache.format.arrays import ArrayLayout
from logitcache.cache.format.layout import Layout, layout_of
from logitcache.cache.format.manifest import ERROR_TEMPERATURES, Manifest
from logitcache.cache.format.metadata import metadata_files
from logitcache.cache.format.samples import Samples
from logitcache.cache.format.shard_rows import choose_shard_rows
from logitcache.cache.read.row_sources import PackedRows, num_kept
from logitcache.cache.snapshot import open_snapshot
from logitcache.cache.write.writer import CacheWriter
from logitcache.store.local import LocalStore
from logitcache.store.shards import seal
from logitcache.store.shared_memory import SharedShards
from logitcache.views.canaries import array_digest
from logitcache.views.keys import Keys, ViewKey

NUM_IMAGES, QUICK_IMAGES, NUM_VIEWS = 1_280_000, 320_000, 300
BATCH, BATCHES = 256, 100
AROUND = (49 / 2 + 7) / 7
"""Half of the 49 us that rows of top-10 once took around a gather of 7 us."""

TOP10 = {"kind": "top_k", "k": 10}
DENSE = {"kind": "dense"}


def manifest_of(logits: dict[str, Any], num_images: int, num_views: int, num_classes: int) -> tuple[Manifest, Samples]:
    """Return the manifest of a cache of images that do not exist, and what its skeleton holds."""
    pixels = np.zeros((1, 3, 1, 1), np.uint8)
    samples = Samples(np.full(num_images, -1), np.zeros(num_images, np.uint64), pixels)
    some, sha = "0" * 64, hashlib.sha256
    temperatures = [] if logits.get("dtype") == "float32" else ERROR_TEMPERATURES
    stored = {
        "dataset": None,
        "fingerprint": {
            "num_images": num_images,
            "num_classes": None,
            "class_names": None,
            "ids": some,
            "labels": sha(samples.labels.astype("<i8").tobytes()).hexdigest(),
            "sizes": some,
            "content": sha(samples.digests.tobytes()).hexdigest(),
        },
        "views": {"num_views": num_views},
        "image_shape": pixels.shape[1:],
        "shard_rows": 1,
        "teachers": {
            "t": {
                "model": None,
                "weights": some,
                "preprocessing": {"mean": [0.5], "std": [0.5]},
                "precision": "float32",
                "num_classes": num_classes,
                "logits": logits,
                "stored_logits": {"form": logits, "error_temperatures": temperatures},
            }
        },
        "canaries": [{"view": 0, "index": 0, "raw": some, "plan": some, "augmented": array_digest(pixels[0])}],
        "versions": {"zarr": zarr.__version__},
    }
    manifest = Manifest.model_validate_json(json.dumps(stored))
    rows = choose_shard_rows(list(manifest.teachers.values()), num_images, None)
    return manifest.model_copy(update={"shard_rows": rows}), samples


def skeleton(path: Path, logits: dict[str, Any], num_images: int, num_views: int, num_classes: int = 1000) -> Layout:
    """Write all of a cache but its shards."""
    manifest, samples = manifest_of(logits, num_images, num_views, num_classes)
    for key, data in (metadata_files(manifest) | samples.files()).items():
        (path / key).parent.mkdir(parents=True, exist_ok=True)
        (path / key).write_bytes(data)
    return layout_of(manifest)


def made(array: ArrayLayout, count: int, generator: np.random.Generator) -> NDArray[Any]:
    """Make rows: float16 in steps of 1/4, as a coarse encoding has them; classes; moments; or no errors."""
    shape = (count, *array.row_shape)
    if array.per_shard:
        return np.zeros((1, *array.row_shape), array.dtype)
    if array.dtype.kind == "f":
        return (generator.standard_normal(shape, np.float32) * 8).round().astype(array.dtype) / 4
    return generator.integers(0, 1000, shape).astype(array.dtype)


def filled(path: Path, logits: dict[str, Any], num_images: int, num_classes: int = 1000) -> Cache:
    """Make a cache of one view."""
    layout, generator = skeleton(path, logits, num_images, 1, num_classes), np.random.default_rng(0)
    writer, rows = CacheWriter(LocalStore(path), layout), {}
    for shard in layout.shards():
        if len(rows.get(layout.arrays[0].name, ())) != shard.stop - shard.start:
            rows = {array.name: made(array, shard.stop - shard.start, generator) for array in layout.arrays}
        writer.submit(shard, rows)
    writer.flush()
    writer.close()
    return open_cache(path)


def memmaps(cache: Cache, folder: Path) -> list[np.memmap[Any, Any]]:
    """Write the arrays as plain files, once, and map them."""
    arrays = cache.layout.targets[0].rows
    folder.mkdir(exist_ok=True)
    for array in arrays:
        if not (folder / array.name).exists():
            with open(folder / array.name, "wb") as file:
                for shard in cache.layout.shards():
                    size = (shard.stop - shard.start) * array.row_bytes
                    file.write(memoryview((cache.path / array.file(shard)).read_bytes())[:size])
                file.flush()
                os.fsync(file.fileno())
    shapes = [(array.num_images, *array.row_shape) for array in arrays]
    return [
        np.memmap(folder / array.name, array.dtype, "r", shape=shape)
        for array, shape in zip(arrays, shapes, strict=True)
    ]


def batches(cache: Cache, number: int, count: int = BATCHES) -> list[list[ViewKey]]:
    """Draw random batches of keys, others in each round."""
    indices = np.random.default_rng(number).integers(0, len(cache), (count, BATCH))
    return [[ViewKey(0, index) for index in batch] for batch in indices.tolist()]


def median_ratio(ours: Work, theirs: Work, rounds: int) -> tuple[float, float]:
    """Return how many times as long theirs takes, and the seconds of ours."""
    mine, others = alternate(ours, theirs, rounds)
    return statistics.median(b / a for a, b in zip(mine, others, strict=True)), statistics.median(mine)


def gather_rows(name: str, cache: Cache, folder: Path, rounds: int) -> Iterator[Row]:
    """Compare the gather alone, then all of `Cache.rows` with the same work by hand."""
    maps, stored = memmaps(cache, folder), cache._stored
    cache.rows([ViewKey(0, 0)])
    for start in range(0, len(cache), 8192):  # the first touch of a page costs both the same, once
        every = np.arange(start, min(start + 8192, len(cache)))
        stored.take(every), [rows.take(every, axis=0) for rows in maps]
    places = [[np.array([key.index for key in batch]) for batch in batches(cache, number)] for number in range(8)]

    # Nothing is kept of a batch: memory is taken from the system again for what is.
    def ours(number: int) -> None:
        for place in places[number % 8]:
            stored.take(place)

    def theirs(number: int) -> None:
        for place in places[number % 8]:
            for rows in maps:
                rows.take(place, axis=0)

    ratio, mine = median_ratio(ours, theirs, rounds)
    yield Row(f"{name}: gather, speed of np.memmap.take", ratio, 0.95, note=f"{mine / BATCHES * 1e6:.0f} us a batch")
    drawn = [batches(cache, number) for number in range(8)]

    def by_hand(number: int) -> None:
        for batch in drawn[number % 8]:
            place = np.array([key.index for key in batch])
            for rows in maps:
                torch.from_numpy(rows.take(place, axis=0))

    def by_cache(number: int) -> None:
        for batch in drawn[number % 8]:
            cache.rows(batch)

    ratio, mine = median_ratio(by_cache, by_hand, rounds)
    note = f"{mine / BATCHES * 1e6:.0f} us a batch; keys checked, targets made"
    yield Row(f"{name}: Cache.rows, speed of np.memmap by hand", ratio, 0.0, note=note)
    tables = [[Keys(np.array(batch)) for batch in some] for some in drawn]

    def by_loader(number: int) -> None:
        for keys in tables[number % 8]:
            cache.rows(keys)

    ratio, mine = median_ratio(by_loader, ours, rounds)
    note = f"{mine / BATCHES * 1e6:.0f} us a batch, as loaders ask"
    is_short = name == "top-10"
    yield Row(f"{name}: Cache.rows, time over its gather", 1 / ratio, AROUND * is_short, at_most=is_short, note=note)


def lmdb_row(name: str, cache: Cache, folder: Path, rounds: int) -> Row:
    """Compare with a database of one record per image; the best case for it: one transaction, keys made before."""
    import lmdb

    arrays, maps = cache.layout.arrays, memmaps(cache, folder)
    record = np.dtype([(str(number), array.dtype, array.row_shape) for number, array in enumerate(arrays)])
    environment = lmdb.open(str(folder / "lmdb"), map_size=1 << 34, readahead=False, sync=False)
    with environment.begin(write=True) as transaction:
        step = 1 << 16
        for start in range(0, len(cache), step):
            values = np.empty(min(step, len(cache) - start), record)
            for number, rows in enumerate(maps):
                values[str(number)] = rows[start : start + step]
            pairs = [(key.to_bytes(4, "big"), row.tobytes()) for key, row in enumerate(values, start)]
            transaction.cursor().putmulti(pairs, append=True)
    drawn = [[[key.index.to_bytes(4, "big") for key in batch] for batch in batches(cache, n, 20)] for n in range(4)]
    places = [[np.array([key.index for key in batch]) for batch in batches(cache, n, 20)] for n in range(4)]

    def theirs(number: int) -> None:
        with environment.begin(buffers=True) as transaction:
            for batch in drawn[number % 4]:
                np.frombuffer(b"".join([transaction.get(key) for key in batch]), record)

    def ours(number: int) -> None:
        for place in places[number % 4]:
            cache._stored.take(place)

    ratio, _ = median_ratio(ours, theirs, rounds)
    environment.close()
    shutil.rmtree(folder / "lmdb")
    return Row(f"{name}: gather, speed of LMDB", ratio, 5.0)


def _count(cache: Cache, duration: float, barrier: Any, answer: Any) -> None:
    places = [np.array([key.index for key in batch]) for batch in batches(cache, os.getpid())]

    def work() -> None:
        for place in places:
            cache._stored.take(place)

    work()
    barrier.wait()
    started, used, done = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - started < duration:
        work()
        done += len(places)
    answer.put(done / (time.process_time() - used))


def processes_row(name: str, cache: Cache, duration: float) -> Row:
    """Compare what two processes gather at a time with what one does, per second of CPU time that each of them got."""
    context = multiprocessing.get_context("fork")

    def rate(count: int) -> float:
        barrier, answer = context.Barrier(count), context.Queue()
        processes = [context.Process(target=_count, args=(cache, duration, barrier, answer)) for _ in range(count)]
        for process in processes:
            process.start()
        total = sum(answer.get() for _ in processes)
        for process in processes:
            process.join()
        return float(total)

    cache.rows([ViewKey(0, 0)])
    ones, twos = zip(*((rate(1), rate(2)) for _ in range(3)), strict=True)
    return Row(f"{name}: two processes", statistics.median(twos) / statistics.median(ones), 1.8)


def forget(paths: list[Path]) -> None:
    """Drop files from the page cache."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def cold_row(name: str, cache: Path, folder: Path, rounds: int) -> Row:
    """Compare first batches of files that the system does not have in memory; by the clock."""
    ratios, mine = [], []
    for number in range(rounds):
        forget([*cache.rglob("c.*"), *folder.iterdir()])
        [keys] = batches(opened := Cache(open_snapshot(cache)), 1000 + number, 1)
        opened._stored._compared.add(0)  # the comparison would read every byte
        opened._stored.places([ViewKey(0, 0)])
        maps, place = memmaps(opened, folder), np.array([key.index for key in keys])
        times = [
            seconds(lambda opened=opened, keys=keys: opened.rows(keys), time.perf_counter),
            seconds(lambda maps=maps, place=place: [rows.take(place, axis=0) for rows in maps], time.perf_counter),
        ]
        ratios.append(times[1] / times[0])
        mine.append(times[0])
        del opened, maps
    note = f"{statistics.median(mine) * 1e3:.1f} ms a batch"
    return Row(f"{name}: cold batch, speed of np.memmap", statistics.median(ratios), 10.0, note=note)


def sparse(path: Path) -> Path:
    """Make a cache of 300 views of 1.28 M images whose shards are holes."""
    layout = skeleton(path, TOP10, NUM_IMAGES, NUM_VIEWS)
    digests: dict[int, bytes] = {}
    for group in layout.groups:
        for name in [group.commits, *(array.name for array in group.arrays)]:
            (path / name).mkdir(exist_ok=True)
        for shard in layout.shards():
            records = []
            for array in group.arrays:
                size = array.hot_bytes(shard.stop - shard.start) if array.storage == "hot" else array.hot_bytes(0) + 400
                if size not in digests:
                    digests[size] = hashlib.sha256(bytes(size)).digest()
                with open(path / array.file(shard), "wb") as file:
                    file.truncate(size)
                records.append(size.to_bytes(8, "little") + seal(digests[size], array.file(shard)))
            (path / group.record_file(shard)).write_bytes(b"".join(records))
    return path


def opening_row(path: Path, rounds: int) -> Row:
    """Time opening again, by CPU time: the first opening reads all commit records."""
    time.sleep(2.5)  # what changed just now is not remembered
    first = seconds(lambda: open_cache(path))
    times = [seconds(lambda: open_cache(path)) for _ in range(rounds)]
    files = sum(len(files) for _, _, files in os.walk(path))
    name = f"opening {NUM_VIEWS} views x {NUM_IMAGES:,} images"
    note = f"{files:,} files; {first * 1e3:.0f} ms the first time"
    return Row(name, statistics.median(times) * 1e3, 50.0, "ms", at_most=True, note=note)


def packed_row(folder: Path, num_images: int, rounds: int) -> Row:
    """Compare the decoding of a view into shared memory with a read of the whole array."""
    cache = filled(folder / "packed.zarr", {"kind": "dense", "storage": "packed"}, num_images, num_classes=200)
    array = cache.layout.targets[0].arrays[0]
    places = np.arange(0, array.num_images, array.shard_rows)
    memory = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else folder))
    name = "zarrs" if find_spec("zarrs") else "zarr"
    pipeline = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"} if name == "zarrs" else {}

    def ours() -> None:
        PackedRows(cache.snapshot.array(array), num_kept(array), SharedShards(memory, 1 << 40)).take(places)

    def theirs() -> None:
        with zarr.config.set(pipeline):
            zarr.open_array(cache.path / array.name, mode="r")[0]

    ratios, rates = [], []
    try:
        for _ in range(rounds):
            mine, other = seconds(ours, time.perf_counter), seconds(theirs, time.perf_counter)
            ratios.append(other / mine)
            rates.append(array.num_images * array.row_bytes / mine / 1e9)
            for file in memory.iterdir():
                file.unlink()
    finally:
        shutil.rmtree(memory)
    note = f"{statistics.median(rates):.2f} GB/s"
    return Row(f"packed view ready, speed of {name}' whole array", statistics.median(ratios), 0.8, note=note)


def rows_of(folder: Path, quick: bool) -> Iterator[Row]:
    """Measure everything."""
    rounds = 9 if quick else 31
    yield opening_row(sparse(folder / "sparse.zarr"), 5)
    shutil.rmtree(folder / "sparse.zarr")
    yield packed_row(folder, QUICK_IMAGES if quick else NUM_IMAGES, 3 if quick else 7)
    for name, logits, count in (
        ("top-10", TOP10, NUM_IMAGES),
        ("dense 1000", DENSE, QUICK_IMAGES if quick else NUM_IMAGES),
    ):
        cache = filled(folder / f"{logits['kind']}.zarr", logits, count)
        plain = folder / logits["kind"]
        yield from gather_rows(name, cache, plain, rounds)
        if find_spec("lmdb") and (logits is TOP10 or not quick):
            yield lmdb_row(name, cache, plain, 5)
        yield processes_row(name, cache, 0.4 if quick else 3.0)
        path = cache.path
        del cache  # pages that are mapped stay in memory
        yield cold_row(name, path, plain, 7 if quick else 15)
        shutil.rmtree(plain)
        shutil.rmtree(path)


def main() -> int:
    """Print each figure beside its goal."""

    def images(quick: bool) -> dict[str, Any]:
        return {"quick": quick, "dense_images": QUICK_IMAGES if quick else NUM_IMAGES}

    parser = parser_of(__doc__, "fewer rounds and dense rows", "where to put a few GB of temporary files")
    return run_benchmark(parser, rows_of, 50, shared=images)


if __name__ == "__main__":
    sys.exit(main())
