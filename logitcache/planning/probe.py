"""The loop of stage one over a few batches, with nothing written: how fast it is, and what its answers compress to."""

import contextlib
import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from logitcache.cache.write.writer import Rows, empty_rows
from logitcache.planning.compression import Piece, stored_of
from logitcache.planning.draft import Draft
from logitcache.planning.timing import Answered, answered, by_row
from logitcache.runtime.console import track
from logitcache.runtime.device import synchronize
from logitcache.stage_one.keeper import Keeper
from logitcache.stage_one.precompute import batches_of
from logitcache.stage_one.share import WHOLE, Share
from logitcache.store.shards import Shard
from logitcache.views.keys import ViewKey
from logitcache.views.loader import ViewLoader

BATCHES, SECONDS, FEWEST = 32, 20.0, 3
"""Batches of a probe, unless told: it ends after SECONDS, but not before it has the FEWEST."""

RUN_ROWS = 2048
"""Rows that lie beside each other in a shard are probed together: compression looks for what they have in common."""

MOST_BYTES = 256 << 20
"""Of the rows that a probe keeps in memory."""

ALONE = 64
"""Images that are rendered once more, alone, to know what that takes."""

Batch = dict[Shard, list[ViewKey]]


@dataclass(frozen=True)
class Probe:
    """What a probe found; seconds are by row-view, an image in one view.

    start: seconds until the first batch, above those of any other. loop: of the loop by the clock. render: in one
    process. answer: of all teachers. keep: encoding, and copying to the shard. cores: of all cores, in the loop and in
    writing. write, write_shard: of the thread that compresses and hashes, by row-view and besides by shard. packed:
    bytes of a row after compression, by array name. device_bytes: peak of a CUDA device.
    """

    batches: int
    rows: int
    start: float
    loop: float
    render: float
    answer: float
    keep: float
    cores: float
    write: float
    write_shard: float
    packed: Mapping[str, float]
    device_bytes: int | None


def probe(draft: Draft, batches: int | None = None) -> Probe:
    """Answer some batches of what is to do, at most `batches`; at least one shard is to do."""
    recipe, device = draft.recipe, draft.teachers[0].device
    steps = _steps(draft, batches or _affordable(draft))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    loader = ViewLoader(draft.views.answered(), recipe.num_workers, recipe.start_method)
    with contextlib.closing(loader), answered(draft.teachers) as answers:
        loop = _loop(draft, loader, steps, answers, None if batches else SECONDS)
    rendering, render_cores = _render_alone(draft, steps[0])
    measured = Measured.of(loop.marks, recipe.num_workers)
    stored = stored_of(draft.plan.layout, loop.pieces)
    busy = measured.cores + (render_cores if recipe.num_workers else 0.0)
    return Probe(
        batches=len(loop.marks) - 1,
        rows=loop.marks[-1].rows,
        start=max(0.0, loop.marks[1].clock - began - loop.marks[1].rows * measured.loop),
        loop=measured.loop,
        render=rendering,
        answer=measured.answer,
        keep=measured.keep,
        cores=busy + stored.cores,
        write=stored.row,
        write_shard=stored.shard,
        packed=stored.packed,
        device_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    )


class Mark(NamedTuple):
    """Sums when a batch was done: row-views; seconds by the clock, of this process's cores, waited, and of teachers."""

    rows: int
    clock: float
    cores: float
    waited: float
    answered: float


class _Loop(NamedTuple):
    pieces: dict[Shard, Piece]
    marks: list[Mark]


def _affordable(draft: Draft) -> int:
    """Return how many batches a probe takes: fewer where their rows would fill much memory."""
    row = sum(array.row_bytes for array in draft.plan.layout.arrays if not array.per_shard)
    most = MOST_BYTES // (row * draft.recipe.batch_size * draft.recipe.views_per_image)
    return max(FEWEST, min(BATCHES, most))


def _steps(draft: Draft, count: int) -> list[Batch]:
    """Choose batches from all over what is to do, in runs that lie beside each other."""
    recipe = draft.recipe
    groups = Share(draft.plan.snapshot, draft.plan.pending, recipe.views_per_image, WHOLE).groups
    in_group = [-(-(group[0].stop - group[0].start) // recipe.batch_size) for group in groups]
    length = max(1, min(-(-RUN_ROWS // recipe.batch_size), max(in_group), count))
    all_of_it = sum(in_group) <= count
    shortest = 1 if all_of_it else length
    runs = [(at, start) for at, size in enumerate(in_group) for start in range(0, size - shortest + 1, length)]
    wanted = len(runs) if all_of_it else max(1, count // length)
    apart = max(1.0, len(runs) / wanted)
    chosen = [runs[int((number + 0.5) * apart)] for number in range(min(wanted, len(runs)))]
    steps: list[Batch] = []
    for number, start in chosen:
        every = batches_of(groups[number], draft.views.answered(), recipe.batch_size)
        steps += itertools.islice(every, start, start + length)
    return steps


def _loop(draft: Draft, loader: ViewLoader, steps: list[Batch], answers: Answered, seconds: float | None) -> _Loop:
    """Render, answer and encode as stage one does, and note the time after each batch."""
    pieces, keeper = dict[Shard, Piece](), Keeper(draft.views, draft.teachers, draft.plan)
    # The processes that render go on, as they do in a long run.
    ahead = (_keys(batch) for batch in itertools.chain(steps, itertools.cycle(steps)))
    images = loader.render(ahead)
    rows, waited, began = 0, 0.0, time.perf_counter()
    marks = [Mark(0, began, time.process_time(), 0.0, 0.0)]
    for batch in track(steps, "probe", len(steps), "batches"):
        asked = time.perf_counter()
        rendered = next(images)
        waited += time.perf_counter() - asked
        for (shard, keys), pixels in zip(batch.items(), rendered.chunk(len(batch)), strict=True):
            piece = pieces.setdefault(shard, Piece(_room(draft, shard), []))
            keeper.keep(piece.rows, shard, keys, pixels)
            piece.places.extend(key.index - shard.start for key in keys)
            rows += len(keys)
        synchronize(draft.teachers[0].device)
        now = time.perf_counter()
        marks.append(Mark(rows, now, time.process_time(), waited, answers.seconds))
        if seconds is not None and len(marks) > FEWEST and now - began > seconds:
            break
    return _Loop(pieces, marks)


def _keys(batch: Batch) -> list[ViewKey]:
    return list(itertools.chain.from_iterable(batch.values()))


def _room(draft: Draft, shard: Shard) -> Rows:
    """Allocate what a shard lacks; pages that are not filled take no memory."""
    return empty_rows([group for group in draft.plan.layout.groups if shard in draft.missing[group.name]], shard)


def _render_alone(draft: Draft, batch: Batch) -> tuple[float, float]:
    """Return the seconds that rendering a view takes in one process, by the clock or of its cores, and of these."""
    keys = _keys(batch)[:ALONE]
    clock, busy = time.perf_counter(), time.process_time()
    draft.views.answered().__getitems__(keys)
    clock, busy = time.perf_counter() - clock, time.process_time() - busy
    return max(clock, busy) / len(keys), busy / len(keys)


class Measured(NamedTuple):
    """Seconds by row-view of a loop that runs steadily."""

    loop: float
    answer: float
    keep: float
    cores: float

    @classmethod
    def of(cls, marks: list[Mark], num_workers: int) -> "Measured":
        """Take what rows add once the loop runs steadily."""
        _, clock, cores, waited, answered = by_row(marks, num_workers)
        return cls(clock, answered, max(0.0, clock - waited - answered), cores)
