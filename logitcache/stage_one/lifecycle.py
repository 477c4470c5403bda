"""Begin and end the writing of a cache: create or repair it before the first shard, finish it after the last."""

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from logitcache.cache.encodings.dense import Dense
from logitcache.cache.format.manifest import LOGITS, Manifest
from logitcache.cache.format.manifest_diff import extends, is_more
from logitcache.cache.format.metadata import repair_skeleton
from logitcache.cache.format.root import read_manifest
from logitcache.cache.format.row_errors import BOUND
from logitcache.cache.snapshot import Snapshot
from logitcache.cache.write.create import create_skeleton
from logitcache.cache.write.error_summary import note_errors
from logitcache.cache.write.grow import begin_growth, finish_growth, forget_growth
from logitcache.cache.write.unreadable_images import forget_unreadable
from logitcache.cache.write.writer_locks import alone, preparing, writing
from logitcache.config.trust import inherit
from logitcache.errors import TargetErrorWarning
from logitcache.runtime.console import logger
from logitcache.stage_one.claims import Claims, Left
from logitcache.stage_one.loop import Done
from logitcache.stage_one.todo import Todo
from logitcache.store.base import Store
from logitcache.store.files import remove_leftovers
from logitcache.store.shards import Shard
from logitcache.teacher.fitting import table_files


@dataclass(frozen=True)
class PrecomputeResult:
    """Result of a run; `row_views` counts written rows, one for each image in each view.

    `teacher_passes` counts every image that a teacher's network processed, also for trials and for fitting encodings.
    `shards_left` are not committed yet: other running processes have claimed `shards_held` of them, and
    `shards_of_other_parts` belong to other parts.
    """

    cache: str
    shards: int
    shards_written: int
    shards_left: int
    row_views: int
    teacher_passes: int
    seconds: float
    bytes: int
    shards_held: int = 0
    shards_of_other_parts: int = 0

    @property
    def left(self) -> Left:
        """The shards that are not committed, by owner."""
        free = self.shards_left - self.shards_held - self.shards_of_other_parts
        return Left(self.shards_held, self.shards_of_other_parts, free)


@contextlib.contextmanager
def begun(store: Store, find: Callable[[], Todo]) -> Iterator[Todo]:
    """Begin or continue the work that `find` returns, one process at a time; marks this writer until the block ends."""
    with contextlib.ExitStack() as held:
        with preparing(store) as target:
            todo = find()
            _begin(todo, target)
            held.enter_context(writing(store))
        yield replace(todo, tables={})  # they are in the store now


def _begin(todo: Todo, target: Path) -> None:
    """Create the cache at `target`, or repair its files except shards, and write the note of a growth."""
    assert todo.skeleton is not None
    manifest, samples, repairs = todo.skeleton
    samples = samples.of(manifest)
    store, recorded, goal = todo.store, todo.recorded, todo.goal
    tables = {**repairs, **table_files(todo.layout, todo.tables)}
    if recorded is None:
        create_skeleton(target, store, goal, samples, tables)
        return
    for key in repair_skeleton(store, recorded, manifest, samples, repairs):
        logger.info(f"writing again: {store}/{key}")
    inherit(recorded.digest(), manifest.digest())
    forget_unreadable(store)
    if alone(store):
        remove_leftovers(store.path)
    if is_more(goal, manifest):
        begin_growth(store, goal, tables | todo.skeleton.growing_ids(goal))
    store.remove(todo.damaged)


def result_of(todo: Todo, claims: Claims, done: Done, started: float) -> PrecomputeResult:
    """Finish a cache if all its shards are committed, and return the result of the run since `started`."""
    store, missing = todo.store, _finish(todo, done)
    left = claims.count_left(missing)
    if not todo.shards:
        logger.info(f"{store} is complete, there is nothing to do")
    if not missing:
        _warn_of_rounding(read_manifest(store))
    return PrecomputeResult(
        str(store),
        todo.layout.num_shards,
        done.shards,
        len(missing),
        done.row_views,
        done.passes,
        time.perf_counter() - started,
        store.stored_bytes(),
        left.held,
        left.apart,
    )


def _finish(todo: Todo, done: Done) -> list[Shard]:
    """Replace the root once all shards of the grown cache are committed; returns the missing shards."""
    store = todo.store
    with preparing(store):
        # List all records again only if other processes or machines may have committed shards.
        is_ours = done.shards == len(todo.shards)
        filled = todo.snapshot.reread(todo.shards) if is_ours else todo.snapshot.refreshed()
        recorded = read_manifest(store)
        if filled.layout.staged is not None and recorded.num_images >= todo.goal.num_images:
            filled = Snapshot.read(store)  # another process has finished the growth
        before = recorded.digest()
        committed = set(filled.shards)
        left = [shard for shard in filled.layout.shards() if shard not in committed]
        if not left and is_more(todo.goal, recorded) and extends(todo.goal, recorded):
            assert todo.skeleton is not None
            finish_growth(filled, todo.skeleton.grown_files(todo.goal))
            recorded = todo.goal
        elif not left and (cache := filled.of(recorded)).complete:
            note_errors(cache)
        inherit(before, read_manifest(store).digest())
        forget_growth(store, recorded)
        if alone(store):
            remove_leftovers(store.path)
    return left


def _warn_of_rounding(manifest: Manifest) -> None:
    """Warn of dense logits that float16 rounds too much because all classes of a row share a large offset."""
    for name, entry in manifest.teachers.items():
        worst = max(entry.errors_of(LOGITS), key=lambda one: one.scaled, default=None)
        if worst is not None and worst.scaled > BOUND and isinstance(entry.logits, Dense):
            warnings.warn(
                f"teachers.{name}: the logits have so large a common offset that float16 rounds away differences of "
                f"classes: a mean KL divergence of {worst.mean:.2g} nats at T = {worst.temperature:g}. Fix: precompute "
                f"into another cache with teachers.{name}.logits: {{kind: dense, dtype: float32}}, or {{kind: uint8}} "
                "or {kind: transform, step: 0.1}, which store each row without its offset",
                TargetErrorWarning,
                stacklevel=3,
            )
