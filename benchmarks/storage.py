"""Does a student keep its step rate when its cache is in object storage?

    python benchmarks/storage.py [--quick] [--json] [--folder DIR]

Two small students learn, one from a cache on this machine, one from the same cache in an emulator of S3, a process of
its own on loopback that answers every request 50 ms late. They take turns epoch by epoch; there is no local copy at the
start, and every epoch takes a view that was not read before. All that the two do otherwise is the same: what is judged
is how much longer the second waits for rows, by the clock, in the epochs after the first, and that all views but the
first were there before the epoch that takes them, brought in the student's own turn. The rates themselves, by the clock
and by processor time, which has the work in the background too, tell the same on a machine where nothing else runs. Run
from a checkout, whose tests have the emulator. Exits 1 when a goal is missed.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from _harness import Row, parser_of, run_benchmark
from numpy.typing import NDArray
from torch import Tensor, nn

import logitcache as lc
from logitcache.config.recipe import load_recipe
from logitcache.models.small_cnn import small_cnn
from logitcache.stage_one.precompute import PrecomputeRecipe, precompute
from logitcache.store.mirrors_folder import FOLDER
from logitcache.store.remote.client import Remote
from logitcache.targets import Targets
from logitcache.views.keys import ViewKey

REPOSITORY = Path(__file__).resolve().parents[1]
LATENCY = 0.05
NUM_CLASSES, BATCH = 1000, 128
AUGMENTATIONS = [{"kind": "random_crop", "size": 28, "padding": 2}, {"kind": "horizontal_flip"}]
NORMALISED = {"mean": [0.5], "std": [0.5]}
ENCODINGS: dict[str, dict[str, Any]] = {
    "top-10, packed": {"kind": "top_k", "k": 10, "storage": "packed"},
    "dense float16, hot": {"kind": "dense", "dtype": "float16"},
}


class Epoch(NamedTuple):
    """When an epoch began and ended, how long it waited for rows, by the clock, and its processor time; in seconds."""

    start: float
    stop: float
    waited: float
    processor: float

    @property
    def seconds(self) -> float:
        """Return how long it took by the clock."""
        return self.stop - self.start


class Images:
    """Random pixels in memory, the same each time."""

    def __init__(self, count: int) -> None:
        self.pixels = np.random.default_rng(0).integers(0, 256, (count, 28, 28, 1), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> NDArray[np.uint8]:
        """Return uint8 [28, 28, 1]."""
        image: NDArray[np.uint8] = self.pixels[index]
        return image


class Cheap(nn.Module):
    """A teacher of one small matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(49, NUM_CLASSES, generator=torch.Generator().manual_seed(0)))

    def forward(self, images: Tensor) -> Tensor:
        """Map [B, 1, 28, 28] to logits, [B, C]."""
        return nn.functional.avg_pool2d(images, 4).flatten(1) @ self.weight


def filled(cache: Path, logits: Mapping[str, Any], num_images: int, num_views: int) -> None:
    """Write the cache on this machine."""
    plan = {
        "cache": str(cache),
        "views": {"num_views": num_views, "augmentations": AUGMENTATIONS},
        "teachers": {"t": {"preprocessing": NORMALISED, "logits": dict(logits)}},
        "batch_size": 512,
        "num_workers": 0,
        "device": "cpu",
    }
    precompute(load_recipe(plan, PrecomputeRecipe), teachers={"t": Cheap()}, dataset=Images(num_images))


class Run:
    """A student in its training."""

    def __init__(self, cache: str, num_images: int) -> None:
        torch.manual_seed(0)
        self._student = small_cnn(4, 1, NUM_CLASSES, 1)
        self._optimizer = torch.optim.AdamW(self._student.parameters())
        self._waited, opened = 0.0, lc.open_cache(cache)
        rows = opened.rows

        def timed(keys: Sequence[ViewKey]) -> dict[str, Targets]:
            started = time.monotonic()
            found = rows(keys)
            self._waited += time.monotonic() - started
            return found

        opened.rows = timed  # type: ignore[method-assign]
        self._loader = opened.loader(BATCH, dataset=Images(num_images))

    def epoch(self, number: int) -> Epoch:
        """Train an epoch."""
        started, used, self._waited = time.monotonic(), time.process_time(), 0.0
        for batch in self._loader.epoch(number):
            logits = self._student(batch.images.float() / 127.5 - 1)
            lc.losses.kl_divergence(logits, batch.targets, temperature=2.0).backward()
            self._optimizer.step()
            self._optimizer.zero_grad()
        return Epoch(started, time.monotonic(), self._waited, time.process_time() - used)


class Emulator:
    """The emulator's process, and what was asked of it."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        server = json.loads(self._line())
        self.url: str = server["url"]
        os.environ |= server["environment"]

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def asked(self) -> list[dict[str, Any]]:
        """List all requests so far."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        found: list[dict[str, Any]] = json.loads(self._line())
        return found


@contextmanager
def emulator() -> Iterator[Emulator]:
    """Serve a bucket until the block ends."""
    command = [sys.executable, "-m", "tests.objects", str(LATENCY)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Emulator(process)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()


def upload(cache: Path, url: str) -> None:
    """Write a cache to the emulator."""
    remote = Remote(url)
    files = [file for file in sorted(cache.rglob("*")) if file.is_file()]
    for _ in remote.each(lambda file: remote.write(str(file.relative_to(cache)), file.read_bytes()), files):
        pass


def shard_reads(storage: Emulator, part: str) -> list[dict[str, Any]]:
    """List what was read of the rows of a cache."""
    paths = [seen for seen in storage.asked() if seen["method"] == "GET" and f"/{part}.zarr/" in seen["path"]]
    return [seen for seen in paths if "/c." in seen["path"] and ".commits/" not in seen["path"]]


def encoding_rows(name: str, folder: Path, storage: Emulator, num_images: int, num_views: int) -> Iterator[Row]:
    """Measure one encoding."""
    label = name.partition(",")[0].replace(" ", "-")
    near, far = folder / f"{label}.zarr", f"{storage.url}/{label}.zarr"
    filled(near, ENCODINGS[name], num_images, num_views)
    upload(near, far)
    disk, elsewhere = Run(str(near), num_images), Run(far, num_images)
    epochs: dict[Run, list[Epoch]] = {disk: [], elsewhere: []}
    for number in range(num_views):
        for run in list(epochs)[:: 1 if number % 2 else -1]:
            epochs[run].append(run.epoch(number))
    reads = shard_reads(storage, label)
    first, others = epochs[elsewhere][0], epochs[elsewhere][1:]
    waited = {run: statistics.mean(epoch.waited for epoch in found[1:]) for run, found in epochs.items()}
    seconds = {run: statistics.median(epoch.seconds for epoch in found[1:]) for run, found in epochs.items()}
    used = {run: statistics.median(epoch.processor for epoch in found[1:]) for run, found in epochs.items()}
    longer = max(0.0, waited[elsewhere] - waited[disk])
    rate = seconds[disk] / (seconds[disk] + longer)
    note = f"{waited[elsewhere] * 1e3:.0f} ms of an epoch waiting for rows, {waited[disk] * 1e3:.0f} ms from the disk"
    yield Row(f"{name}: step rate, of that on a disk", rate, 0.95, note=note)
    note = f"{num_images / BATCH / seconds[elsewhere]:.0f} steps/s"
    yield Row(f"{name}: all that a clock tells", seconds[disk] / seconds[elsewhere], 0, note=note)
    yield Row(f"{name}: all processor time", used[disk] / used[elsewhere], 0)
    waits = [arrival(reads, view + 1) - epoch.start for view, epoch in enumerate(epochs[elsewhere][:-1])]
    in_time = [0 <= wait <= epoch.seconds for wait, epoch in zip(waits, epochs[elsewhere], strict=False)]
    mean = statistics.mean(seen["sent"] for seen in reads) / 1e6
    note = f"{len(reads) / num_views:g} requests of {mean:.2f} MB a view"
    yield Row(f"{name}: views that were there in time", sum(in_time) / len(in_time), 1, "", note=note)
    share = statistics.median(wait / epoch.seconds for wait, epoch in zip(waits[1:], others, strict=False))
    yield Row(f"{name}: next view there after, of an epoch", share, 0)
    yield Row(f"{name}: first view there after", arrival(reads, 0) - first.start, 0, "s")


def arrival(reads: list[dict[str, Any]], view: int) -> float:
    """Return when the last shard of a view was sent."""
    return max(float(seen["at"]) for seen in reads if f"/c.{view}." in seen["path"])


def rows_of(folder: Path, quick: bool) -> Iterator[Row]:
    """Measure everything."""
    os.environ[FOLDER] = str(folder / "copies")
    with emulator() as storage:
        for encoding in ENCODINGS:
            yield from encoding_rows(encoding, folder, storage, *((3_000, 11) if quick else (6_000, 25)))


def main() -> int:
    """Print each figure beside its goal."""
    folder = "where to put a few hundred MB of temporary files"
    return run_benchmark(parser_of(__doc__, "fewer images, under a minute", folder), rows_of, 50)


if __name__ == "__main__":
    sys.exit(main())
