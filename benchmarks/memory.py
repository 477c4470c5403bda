"""Does memory grow with the data set? Stage one and stage two at n and at 10 n images (`--quick`: 5 n).

    python benchmarks/memory.py [--quick] [--json]

Every measurement is a process of its own. What counts is memory that cannot be taken back, the peak of RssAnon and
RssShmem in /proc: pages of a mapped cache file are the system's page cache, shared by all students and given up when
others need it. Decoded shards that the runs of a machine share have a bound of their own, LOGITCACHE_SHARED_MEMORY, and
are left out: they are there once, and a view of them is the goal, not a fault. The baseline is the same process with
everything imported and the model built. n images take at least 20 shards: with fewer, stage
one ends before it holds as many shards at once as it does in a longer run. Exits 1 when a goal is missed.
"""

import multiprocessing
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from _harness import exit_code, parser_of, print_json
from torch import Tensor, nn

from logitcache.cache.cache import open_cache
from logitcache.config.recipe import load_recipe
from logitcache.runtime.console import configure
from logitcache.stage_one.precompute import PrecomputeRecipe, precompute

NUM_CLASSES = 1500
SHARD_ROWS = 1024
SHARD_BYTES = 2 * NUM_CLASSES * SHARD_ROWS
GOAL_SHARDS = 4
"""Growth, in shards, that counts as bounded."""


class Names(Sequence[str]):
    """The names of images that are made, not kept."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        if index >= self._count:
            raise IndexError(index)
        return str(index)


class MadeImages:
    """Images computed from their number: the data set itself takes no memory but its labels and digests."""

    num_classes = None
    class_names = None

    def __init__(self, count: int) -> None:
        self.ids = Names(count)
        self.labels = np.full(count, -1, np.int64)

    def read(self, index: int) -> Tensor:
        """Return uint8 [1, 8, 8]."""
        return torch.full((1, 8, 8), index % 256, dtype=torch.uint8)

    def sizes(self) -> np.ndarray:
        """Return heights and widths: all the same, one row in memory."""
        return np.broadcast_to(np.array([8, 8]), (len(self.ids), 2))

    def digests(self) -> np.ndarray:
        """Return one number per image."""
        return np.arange(len(self.ids), dtype=np.uint64)


def linear() -> nn.Module:
    """Build a model that costs next to nothing."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, NUM_CLASSES))


def stage_one(folder: Path, count: int, storage: str) -> None:
    """Fill a cache of one view."""
    teacher = {"logits": {"kind": "dense", "storage": storage}, "preprocessing": {"mean": [0.5], "std": [0.5]}}
    recipe = {
        "cache": str(folder / f"{count}.zarr"),
        "teachers": {"t": teacher},
        "shard_rows": SHARD_ROWS,
        "num_workers": 0,
    }
    precompute(load_recipe(recipe, PrecomputeRecipe), teachers={"t": linear()}, dataset=MadeImages(count))


def stage_two(folder: Path, count: int, storage: str) -> None:
    """Stream an epoch of batches and their targets, as training does."""
    cache = open_cache(folder / f"{count}.zarr")
    for batch in cache.loader(batch_size=256, dataset=MadeImages(count)).epoch(0):
        batch.targets.logits.sum()


def _peak(work: Callable[[Path, int, str], None], folder: Path, count: int, storage: str, answer: Connection) -> None:
    torch.set_num_threads(1)
    linear()(torch.zeros(2, 1, 8, 8))
    done, baseline, peak = threading.Event(), _anonymous(), 0

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, _anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work(folder, count, storage)
    finally:
        done.set()
        watcher.join()
    answer.send(peak - baseline)


def _anonymous() -> int:
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem")) - _decoded()


def _decoded() -> int:
    """Return what is resident of decoded shards that all runs share."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024 if ours else 0
        elif "-" in line.split(" ", 1)[0]:
            ours = "/logitcache-" in line
    return total


def measure(work: Callable[[Path, int, str], None], folder: Path, count: int, storage: str) -> int:
    """Return the peak memory over the baseline, in bytes, of a process that does `work`."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_peak, args=(work, folder, count, storage, sender))
    process.start()
    sender.close()
    peak: int = receiver.recv()
    process.join()
    return peak


def main() -> int:
    """Print peak memory by stage, storage and number of images beside the goal."""
    arguments = parser_of(__doc__, "fewer images").parse_args()
    configure(quiet=True)
    few, times = (20_480, 5) if arguments.quick else (102_400, 10)
    rows = []
    for storage in ("hot", "packed"):
        with tempfile.TemporaryDirectory() as name:
            for work in (stage_one, stage_two):
                small, large = (measure(work, Path(name), count, storage) for count in (few, times * few))
                growth = (large - small) / SHARD_BYTES
                rows.append(
                    {
                        "stage": work.__name__,
                        "storage": storage,
                        "images": [few, times * few],
                        "peak_mb": [round(small / 1e6, 1), round(large / 1e6, 1)],
                        "growth_in_shards": round(growth, 2),
                        "goal": GOAL_SHARDS,
                        "met": growth <= GOAL_SHARDS,
                    }
                )
    if arguments.json:
        print_json(rows, shard_mb=SHARD_BYTES / 1e6)
    else:
        print(f"peak memory over the baseline, MB; a shard is {SHARD_BYTES / 1e6:.1f} MB")
        for row in rows:
            counts, peaks = row["images"], row["peak_mb"]
            print(
                f"{row['stage']} {row['storage']:<7} {counts[0]:>7,} images {peaks[0]:>6.1f}   {counts[1]:>9,} images "
                f"{peaks[1]:>7.1f}   growth {row['growth_in_shards']:>5.2f} shards, goal <= {GOAL_SHARDS}"
                f"{'' if row['met'] else '   MISSED'}"
            )
    return exit_code(row["met"] for row in rows)


if __name__ == "__main__":
    sys.exit(main())
