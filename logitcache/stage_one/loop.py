"""The loop of stage one: claim shards, compute them batch by batch, write them behind, commit."""

import contextlib
import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from logitcache.cache.write.writer import CacheWriter
from logitcache.runtime.console import track
from logitcache.runtime.stopping import stop_flag
from logitcache.stage_one.claims import Claims, ShardGroup
from logitcache.stage_one.todo import Todo
from logitcache.store.shards import Shard
from logitcache.views.keys import ViewKey


class RowBatch(NamedTuple):
    """Some images of a group of shards, by index; the group is full after its last batch.

    `place` is the position of the images in the teachers' batch, if other images fill it.
    """

    group: ShardGroup
    images: Sequence[int]
    is_last: bool
    place: int | None = None

    @property
    def keys(self) -> dict[Shard, list[ViewKey]]:
        """The views of the images, by shard."""
        return {shard: [ViewKey(shard.view, index) for index in self.images] for shard in self.group.missing}


class ShardTask(ABC):
    """Computes the shards of a cache from opened inputs; each process opens its own task."""

    label: ClassVar[str]
    """Label of the progress bar."""

    todo: Todo
    """The cache to fill."""

    @property
    @abstractmethod
    def passes(self) -> int:
        """Number of images that the networks of the teachers have processed."""

    @abstractmethod
    def num_batches(self, shard: Shard) -> int:
        """Count the batches of the group that a shard is in."""

    @abstractmethod
    def batches(self, group: ShardGroup) -> Iterator[RowBatch]:
        """Cut a group into batches; the cuts do not depend on the missing arrays."""

    @abstractmethod
    def fill(self, batches: Iterator[RowBatch]) -> Iterator[RowBatch]:
        """Fill the rows of each batch and yield it; later batches are read ahead."""


@dataclass
class Done:
    """Counts of this run: committed shards, their rows, and images that teachers have processed."""

    shards: int = 0
    row_views: int = 0
    passes: int = 0

    def count(self, num_new: int) -> None:
        self.shards += 1
        self.row_views += num_new

    def add(self, other: "Done") -> None:
        """Add the counts of a worker of this run."""
        self.shards += other.shards
        self.row_views += other.row_views
        self.passes += other.passes


def fill(task: ShardTask, claims: Claims, done: Done) -> None:
    """Compute and write shards until none can be claimed; raises Stopped after SIGTERM or Ctrl-C."""
    before, writer = task.passes, CacheWriter(task.todo.store, task.todo.layout)
    num_batches = sum(task.num_batches(group[0]) for group in claims.groups)
    with stop_flag() as stop, contextlib.closing(claims), contextlib.closing(writer):

        def pause(seconds: float = 0.0) -> None:
            if stop.wait(seconds):
                writer.flush()
                raise stop.stopped(stopped_message(task.todo, done))

        committed = -1
        # Try again after the last group: a process that died may have released a shard.
        while committed != done.shards or claims.wait(pause):
            committed = done.shards
            batches = (batch for group in claims.take() for batch in task.batches(group))
            for batch in track(task.fill(batches), task.label, num_batches, "batches"):
                pause()
                for shard, rows in batch.group.rows.items() if batch.is_last else ():
                    writer.submit(shard, rows, functools.partial(claims.release, shard))
                    done.count(task.todo.layout.num_new([shard]))
            writer.flush()
    done.passes += task.passes - before


def stopped_message(todo: Todo, done: Done) -> str:
    """Describe the state of a stopped run."""
    return (
        f"stopped: {done.shards} of the {len(todo.shards)} shards that were to do are committed in {todo.store}, what "
        "was in progress is dropped. The same command continues"
    )
