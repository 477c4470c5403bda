"""What do many images, and many shards, ask of one process?

    python benchmarks/scale_limits.py [--quick] [--json] [--folder DIR]

The order of an epoch, plain, mixed and in blocks; opening an image folder and tar shards, for the first time and again,
and what of them the processes that render share; `inspect`, which looks at some of a view; handing out tasks by Dask
(left out with --quick, and where it is not installed). Each step is done in a process of its own; figures are bytes of
memory at its peak by image, and beside them CPU time, which is not judged but for that of `inspect`, roughly. Exits 1
when a figure is more than a quarter above that which scale_model.py reckons with; with --quick, where few images blur
it, when it is twice that.
"""

import io
import os
import pickle
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _harness import Row, parser_of, run_benchmark
from memory import MadeImages, Names
from PIL import Image
from scale_metadata import NUM_CLASSES, SETTLED, memory_of, simulated, took
from scale_model import (
    BLOCKED_MB,
    FOLDER_AGAIN_BYTES,
    FOLDER_BYTES,
    FOLDER_SHARED_BYTES,
    INSPECT_SECONDS,
    MIXED_BYTES,
    ORDER_BYTES,
    SHUFFLE_BYTES,
    TAR_BYTES,
    TAR_SHARED_BYTES,
    TASK_BYTES,
)

from logitcache.report.inspect import inspect_cache
from logitcache.views.datasets.base import fingerprint
from logitcache.views.datasets.image_folder import ImageFolder
from logitcache.views.datasets.webdataset import WebDataset
from logitcache.views.epochs import EpochLoader
from logitcache.views.order import EpochOrder
from logitcache.views.spec import Views, ViewSpec

if TYPE_CHECKING:
    from distributed import Client, Future

QUICK_ORDERS, FULL_ORDERS = (1_281_167,), (1_281_167, 14_197_122, 100_000_000)
FEW, QUICK_FILES, FULL_FILES = 40_000, 80_000, 200_000
MANY, BLOCK = 1_000_000_000, 16_384
"""Images of an epoch in blocks, which takes as much memory of any number."""

FEWEST_TASKS, TASKS = 200, 6000
IN_SHARD, IN_FOLDER = 1000, 1000
JOB_BYTES = 20_000
"""What a task of stage one carries, about: recipe and manifest."""

ROOM, ROOM_OF_FEW, ROUGHLY, INSPECTED = 1.25, 2.0, 4, 65_536
"""How far figures may be above those that are reckoned with: few images blur them."""


def permute(images: int) -> None:
    """Draw the order of all images."""
    EpochOrder(images, 0, 0)


def begin_epoch(images: int, mixes: bool, block: int | None = None) -> None:
    """Draw the first batch of an epoch."""
    dataset = MadeImages(1)
    dataset.ids = Names(images)  # its labels are counted apart
    mixing = ({"kind": "mixup"},) if mixes else ()
    spec = ViewSpec.model_validate({"num_views": 4, "mixing": mixing})
    next(EpochLoader(Views(dataset, spec), shuffle_block=block).keys(0))


def order_rows(images: int, room: float) -> Iterator[Row]:
    """Draw the order of an epoch."""
    cases: list[tuple[str, Callable[..., None], tuple[Any, ...], float]] = [
        ("a permutation", permute, (images,), ORDER_BYTES),
        ("an epoch", begin_epoch, (images, False), SHUFFLE_BYTES),
        ("a mixed epoch", begin_epoch, (images, True), MIXED_BYTES),
    ]
    for name, step, arguments, wanted in cases:
        found = took(step, *arguments)
        note = f"{found}: {1e9 * found.seconds / images:.0f} ns an image"
        yield Row(f"{name} of {images:,} images", found.memory / images, room * wanted, "B", True, note)


def blocked_row() -> Row:
    """Draw the first batch of an epoch in blocks."""
    found = took(begin_epoch, MANY, False, BLOCK)
    return Row(f"an epoch of {MANY:,} images in blocks", found.memory / 1e6, ROOM * BLOCKED_MB, "MB", True, f"{found}")


def picture() -> bytes:
    """Return a small PNG."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return file.getvalue()


def write_folder(root: Path, images: int) -> None:
    """Write an image folder, named as those of ImageNet."""
    content = picture()
    for start in range(0, images, IN_FOLDER):
        folder = root / f"n{start:08d}"
        folder.mkdir(parents=True)
        for number in range(start, min(start + IN_FOLDER, images)):
            (folder / f"{folder.name}_{number:08d}.png").write_bytes(content)


def write_shards(root: Path, images: int) -> None:
    """Write tar shards."""
    content, label = picture(), b"1"
    root.mkdir()
    for start in range(0, images, IN_SHARD):
        with tarfile.open(root / f"{start:09d}.tar", "w") as archive:
            for number in range(start, min(start + IN_SHARD, images)):
                for ending, data in (("png", content), ("cls", label)):
                    member = tarfile.TarInfo(f"{number:09d}.{ending}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))


def sent(dataset: object) -> int:
    """Count the bytes that pickle would give, without making them."""
    arrays: list[pickle.PickleBuffer] = []
    rest = pickle.dumps(dataset, 5, buffer_callback=arrays.append)
    return len(rest) + sum(array.raw().nbytes for array in arrays)


def open_folder(root: Path) -> int:
    """Open an image folder as stage one and two do; returns how much of it the processes that render share."""
    dataset = ImageFolder(root=str(root)).open()
    fingerprint(dataset)
    return sent(dataset)


def open_shards(root: Path) -> int:
    """Open tar shards as stage one and two do; returns how much of it the processes that render share."""
    dataset = WebDataset(shards=tuple(str(path) for path in sorted(root.iterdir()))).open()
    fingerprint(dataset)
    return sent(dataset)


def dataset_rows(folder: Path, images: int, room: float) -> Iterator[Row]:
    """Open images of both kinds, twice; what few images take, any number does."""
    for count in (FEW, images):
        write_folder(folder / f"files{count}", count)
        write_shards(folder / f"shards{count}", count)
    time.sleep(SETTLED)
    shared: dict[str, float] = {}
    for name, step, kind, wanted in (
        ("an image folder, at first", open_folder, "files", FOLDER_BYTES),
        ("an image folder, again", open_folder, "files", FOLDER_AGAIN_BYTES),
        ("tar shards, at first", open_shards, "shards", TAR_BYTES),
        ("tar shards, again", open_shards, "shards", TAR_BYTES),
    ):
        few, found = (took(step, folder / f"{kind}{count}") for count in (FEW, images))
        more = images - FEW
        note = f"{found}: {1e6 * (found.seconds - few.seconds) / more:.1f} us an image"
        each = (found.memory - few.memory) / more
        yield Row(f"{name}: {images:,} images", each, room * wanted, "B", True, note)
        shared[kind] = found.value / images
    for name, kind, wanted in (
        ("an image folder", "files", FOLDER_SHARED_BYTES),
        ("tar shards", "shards", TAR_SHARED_BYTES),
    ):
        yield Row(f"{name}, shared by all that render", shared[kind], ROOM * wanted, "B", True)


def look(path: Path) -> None:
    """Inspect a cache."""
    inspect_cache(path)


def inspect_row(path: Path) -> Row:
    """Inspect a cache of one shard in a view."""
    simulated(path, INSPECTED, 1)
    found = took(look, path)
    each = 1e9 * found.seconds / (INSPECTED * NUM_CLASSES)
    name = f"inspect of {INSPECTED:,} images, by image and class"
    return Row(name, each, ROUGHLY * 1e9 * INSPECT_SECONDS, "ns", True, f"{found}")


def hand_out(tasks: int) -> float:
    """Let two workers do tasks that are nothing but what they carry; returns the bytes of memory by task."""
    from distributed import Client, LocalCluster

    job = os.urandom(JOB_BYTES)
    with (
        LocalCluster(2, threads_per_worker=1, dashboard_address=None, silence_logs=50) as cluster,
        Client(cluster) as it,
    ):
        few, before = _done(it, job, "few", FEWEST_TASKS), memory_of("VmRSS")
        every = _done(it, job, "shard", tasks)
        after = memory_of("VmRSS")
        del few, every  # until here the scheduler keeps them, as it does those of stage one
        return (after - before) / tasks


def _done(client: "Client", job: bytes, name: str, tasks: int) -> "list[Future]":
    from distributed import wait

    keys = [f"{name}-{number}" for number in range(tasks)]
    futures: list[Future] = client.map(_nothing, [job] * tasks, range(tasks), key=keys, retries=3)
    wait(futures)
    return futures


def _nothing(job: bytes, number: int) -> int:
    return number


def rows_of(folder: Path, quick: bool) -> Iterator[Row]:
    """Measure everything."""
    os.environ["XDG_CACHE_HOME"] = str(folder / "remembered")
    room = ROOM_OF_FEW if quick else ROOM
    for images in QUICK_ORDERS if quick else FULL_ORDERS:
        yield from order_rows(images, room)
    yield blocked_row()
    yield from dataset_rows(folder, QUICK_FILES if quick else FULL_FILES, room)
    yield inspect_row(folder / "c.zarr")
    if find_spec("distributed") and not quick:  # few tasks tell nothing
        found = took(hand_out, TASKS)
        note = f"{1e3 * found.seconds / TASKS:.1f} ms of CPU by task in the scheduler"
        yield Row(f"Dask, {TASKS:,} tasks: client and scheduler", found.value, ROOM * TASK_BYTES, "B", True, note)


def main() -> int:
    """Print each figure beside its goal."""
    return run_benchmark(
        parser_of(__doc__, "fewer images, no tasks", "where to put up to 240,000 small files"), rows_of, 52
    )


if __name__ == "__main__":
    sys.exit(main())
