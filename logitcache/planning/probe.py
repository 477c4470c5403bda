"""The loop of stage one over a few batches, with nothing written: how fast it is, and what its answers compress to."""

import contextlib
import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from logitcache.planning.compression import Piece, stored_of
from logitcache.planning.dry_run import DryRun
from logitcache.planning.timing import AnswerTimes, Quartiles, by_row, timed_answers
from logitcache.runtime.console import track
from logitcache.runtime.device import synchronize
from logitcache.stage_one.claims import Claims, ShardGroup
from logitcache.stage_one.loop import RowBatch
from logitcache.stage_one.precompute import PrecomputeTask
from logitcache.stage_one.todo import Todo
from logitcache.store.shards import Shard

BATCHES, SECONDS, FEWEST = 32, 20.0, 3
"""Batches of a probe by default: it ends after SECONDS, but not before it has the FEWEST."""

SHARE, LEAST_SECONDS = 1 / 20, 2.0
"""Of little work a probe takes this share of the time that it predicts, or the least."""

RUN_ROWS = 2048
"""Rows that lie beside each other in a shard are probed together: compression looks for what they have in common."""

MOST_BYTES = 256 << 20
"""The most bytes of rows that a probe holds in memory."""

ALONE = 64
"""Images that are rendered once more, alone, to time rendering."""


@dataclass(frozen=True)
class Probe:
    """Measurements of a probe; seconds are by row-view, an image in one view.

    start: seconds until the first batch, above those of any other. loop: of the loop by the clock, as quartiles.
    render: in one process. answer: of all teachers. keep: encoding, and copying to the shard. cores: of all cores, in
    the loop and in writing. write, write_shard: of the thread that compresses and hashes, by row-view and besides by
    shard. packed: compressed bytes of a row, by array name. device_bytes: peak of a CUDA device.
    """

    batches: int
    rows: int
    start: float
    loop: Quartiles
    render: float
    answer: float
    keep: float
    cores: float
    write: float
    write_shard: float
    packed: Mapping[str, float]
    device_bytes: int | None


def probe(run: DryRun, batches: int | None = None) -> Probe:
    """Compute at most `batches` batches of the missing shards, of which there is at least one."""
    recipe, device = run.inputs.recipe, run.inputs.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    task = PrecomputeTask(run.inputs, run.todo, notes_unreadable=False)
    with contextlib.closing(task), timed_answers(run.inputs.teachers) as answers:
        steps = _steps(run, task, batches or _affordable(run))
        todo = run.todo.layout.num_new(run.todo.shards)
        marks = _marks(task, steps, answers, device, None if batches else todo)
    rendering, render_cores = _render_alone(run, steps[0])
    measured = Measured.of(marks, recipe.num_workers)
    stored = stored_of(run.todo.layout, _pieces(steps[: len(marks) - 1]))
    busy = measured.cores + (render_cores if recipe.num_workers else 0.0)
    return Probe(
        batches=len(marks) - 1,
        rows=marks[-1].rows,
        start=max(0.0, marks[1].clock - began - marks[1].rows * float(measured.loop[1])),
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


def _affordable(run: DryRun) -> int:
    """Return how many batches a probe takes: fewer if their rows would fill much memory."""
    row = sum(array.row_bytes for array in run.todo.layout.arrays if not array.per_shard)
    most = MOST_BYTES // (row * run.inputs.recipe.batch_size * run.inputs.recipe.views_per_image)
    return max(FEWEST, min(BATCHES, most))


def _steps(run: DryRun, task: PrecomputeTask, count: int) -> list[RowBatch]:
    """Choose batches spread over all missing shards, in consecutive runs."""
    recipe, todo = run.inputs.recipe, run.todo
    groups = Claims(todo.snapshot, todo.shards, recipe.views_per_image).groups
    in_group = [task.num_batches(group[0]) for group in groups]
    length = max(1, min(-(-RUN_ROWS // recipe.batch_size), max(in_group), count))
    all_of_it = sum(in_group) <= count
    shortest = 1 if all_of_it else length
    runs = [(at, start) for at, size in enumerate(in_group) for start in range(0, size - shortest + 1, length)]
    wanted = len(runs) if all_of_it else max(1, count // length)
    apart = max(1.0, len(runs) / wanted)
    chosen = [runs[int((number + 0.5) * apart)] for number in range(min(wanted, len(runs)))]
    opened = {number: _group(todo, groups[number]) for number, _ in chosen}
    steps: list[RowBatch] = []
    for number, start in chosen:
        steps += itertools.islice(task.batches(opened[number]), start, start + length)
    return steps


def _group(todo: Todo, shards: list[Shard]) -> ShardGroup:
    """Return shards with what they lack; pages of their rows that are not filled take no memory."""
    groups = todo.layout.groups
    return ShardGroup({shard: [one for one in groups if shard in todo.missing[one.name]] for shard in shards})


def _marks(
    task: PrecomputeTask, steps: list[RowBatch], answers: AnswerTimes, device: torch.device, todo: int | None
) -> list[Mark]:
    """Fill batches as stage one does, and note the time after each; all of them unless there are `todo` row-views."""
    began = time.perf_counter()
    marks = [Mark(0, began, time.process_time(), 0.0, 0.0)]
    # The processes that render go on, as they do in a long run.
    filled = itertools.islice(task.fill(itertools.chain(steps, itertools.cycle(steps))), len(steps))
    limit = f", {SECONDS:g} s at most" if todo is not None else ""
    for batch in track(filled, f"probe{limit}", len(steps), "batches"):
        rows = marks[-1].rows + len(batch.images) * len(batch.group.missing)
        synchronize(device)
        now = time.perf_counter()
        marks.append(Mark(rows, now, time.process_time(), task.waited, answers.seconds))
        if todo is not None and len(marks) > FEWEST and now - began > _most_seconds((now - began) / rows * todo):
            break
    return marks


def _most_seconds(predicted: float) -> float:
    """Return how long a probe of work goes on that takes the predicted seconds."""
    return min(SECONDS, max(LEAST_SECONDS, SHARE * predicted))


def _pieces(steps: list[RowBatch]) -> dict[Shard, Piece]:
    """Return the rows that were filled, by shard, with their places in it."""
    pieces: dict[Shard, Piece] = {}
    for batch in steps:
        for shard, rows in batch.group.rows.items():
            pieces.setdefault(shard, Piece(rows, [])).places.extend(index - shard.start for index in batch.images)
    return pieces


def _render_alone(run: DryRun, batch: RowBatch) -> tuple[float, float]:
    """Return the seconds that rendering a view takes in one process, by the clock or of its cores, and of these."""
    keys = list(itertools.chain.from_iterable(batch.keys.values()))[:ALONE]
    clock, busy = time.perf_counter(), time.process_time()
    run.inputs.views.answered().__getitems__(keys)
    clock, busy = time.perf_counter() - clock, time.process_time() - busy
    return max(clock, busy) / len(keys), busy / len(keys)


class Measured(NamedTuple):
    """Seconds by row-view of a loop that runs steadily."""

    loop: Quartiles
    answer: float
    keep: float
    cores: float

    @classmethod
    def of(cls, marks: list[Mark], num_workers: int) -> "Measured":
        """Measure what each row adds once the loop runs steadily."""
        _, clock, cores, waited, answered = by_row(marks, num_workers)
        return cls(clock, answered[1], max(0.0, clock[1] - waited[1] - answered[1]), cores[1])
