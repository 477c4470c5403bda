"""Stage one: run the teachers once over every view and keep their answers."""

import contextlib
import functools
import itertools
import math
import multiprocessing
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from logitcache.cache.cache import Cache
from logitcache.cache.format.arrays import Rows
from logitcache.cache.format.layout import CHECKSUMS
from logitcache.cache.format.manifest import Manifest
from logitcache.cache.format.root import read_manifest
from logitcache.cache.replay import require_canaries
from logitcache.cache.snapshot import Snapshot
from logitcache.cache.write.unreadable_images import note_unreadable
from logitcache.config.trust import remember
from logitcache.errors import DataError, MismatchError, RecipeError, caught
from logitcache.models import AnswersByKey, weights_digest
from logitcache.runtime.console import logger
from logitcache.runtime.device import to_device
from logitcache.stage_one.claims import Claims, Part, ShardGroup, parse_part
from logitcache.stage_one.cluster.cluster import Cluster
from logitcache.stage_one.cluster.fill_on_cluster import TaskOpener, fill_on_cluster, open_same
from logitcache.stage_one.inputs import Inputs, open_inputs
from logitcache.stage_one.lifecycle import PrecomputeResult, begun, result_of
from logitcache.stage_one.loop import Done, RowBatch, ShardTask, fill
from logitcache.stage_one.todo import Todo, find_todo
from logitcache.store.remote.client import is_remote
from logitcache.store.shards import Shard
from logitcache.teacher.encoding import fill_rows
from logitcache.teacher.precompute_recipe import PrecomputeRecipe
from logitcache.teacher.speed import note_other_machine
from logitcache.teacher.teacher import require_answers, take_recorded
from logitcache.views.canaries import DEFAULT_LIMITS
from logitcache.views.checksums import require_rows, row_checksums
from logitcache.views.keys import ViewKey
from logitcache.views.loader import ViewLoader

__all__ = ["PrecomputeRecipe", "PrecomputeResult", "precompute"]


class PrecomputeTask(ShardTask):
    """Compute shards of teachers' answers; `waited` adds up the seconds spent waiting for rendered views.

    An image that cannot be read is noted in the cache, unless `notes_unreadable` is False: nothing is written then.
    """

    label = "precompute"

    def __init__(self, inputs: Inputs, todo: Todo, *, notes_unreadable: bool = True) -> None:
        self.todo, self._inputs, self._notes_unreadable = todo, inputs, notes_unreadable
        recipe = inputs.recipe
        self._answered = inputs.views.answered()
        self._loader = ViewLoader(self._answered, recipe.num_workers, recipe.start_method)
        self.waited = 0.0

    @property
    def passes(self) -> int:
        """How many images the teachers' networks have taken."""
        return self._inputs.passes

    def num_batches(self, shard: Shard) -> int:
        """Count the batches of the group that a shard is in."""
        return sum(1 for _ in self._cuts(shard))

    def batches(self, group: ShardGroup) -> Iterator[RowBatch]:
        """Cut a group into batches of images; a teacher's batch is the same whatever is rendered with it.

        Partners in one shard come together, so that each is decoded once.
        """
        first = next(iter(group.missing))
        pairs = self._answered.pairs
        indices = np.arange(first.start, first.stop)
        if pairs is not None:
            indices = indices[np.argsort(pairs.places(np.full_like(indices, first.view), indices))]
        for start, stop, place in self._cuts(first):
            yield RowBatch(group, indices[start:stop].tolist(), stop == len(indices), place)

    def _cuts(self, shard: Shard) -> Iterator[tuple[int, int, int | None]]:
        """Yield where the batches of a shard begin and end, and the place of the rows in what teachers answer.

        Appended images are answered in whole batches of the shard, with copies in the place of others: what is kept of
        one depends neither on which runs appended images nor on which came with it.
        """
        size, num_rows = self._inputs.recipe.batch_size, shard.stop - shard.start
        num_first = min(max(0, self.todo.goal.first.num_images - shard.start), num_rows)
        num_known = self.todo.layout.num_known(shard)
        for start in range(0, num_first, size) if not num_known else ():
            yield start, min(start + size, num_first), None
        for cell in range(num_first // size * size, num_rows, size):
            start, stop = max(cell, num_first, num_known), min(cell + size, num_rows)
            if start < stop:
                yield start, stop, start - cell

    @cached_property
    def _recorded(self) -> Snapshot:
        """The cache as its root describes it, while it grows."""
        return Snapshot.read(self.todo.store)

    def _take_over(self, group: ShardGroup) -> None:
        """Copy the rows that a shard has already, if images are appended to it."""
        for shard, rows in group.rows.items():
            if not (num_known := self.todo.layout.num_known(shard)):
                continue
            arrays = {array.name: array for array in self._recorded.layout.arrays}
            for name, values in rows.items():
                known = self._recorded.array(arrays[name]).rows(shard._replace(stop=shard.start + num_known))
                values[: len(known)] = known

    def fill(self, batches: Iterator[RowBatch]) -> Iterator[RowBatch]:
        """Render each batch ahead, and fill its rows with what the teachers answer."""
        ours, ahead = itertools.tee(batches)
        images = self._loader.render(_flat(batch.keys) for batch in ahead)
        group = None
        for batch in ours:
            if batch.group is not group:
                group = batch.group
                self._take_over(group)
            began, keys = time.perf_counter(), batch.keys
            rendered = self._next(images, keys)
            self.waited += time.perf_counter() - began
            for (shard, some), pixels in zip(keys.items(), rendered.chunk(len(keys)), strict=True):
                self._fill(batch.group.rows[shard], shard, some, pixels, batch.place)
            yield batch

    def close(self) -> None:
        """End the processes that render."""
        self._loader.close()

    def _next(self, images: Iterator[Tensor], keys: Mapping[Shard, list[ViewKey]]) -> Tensor:
        """Take the next batch; note images that cannot be read, which may be repaired before the run continues."""
        try:
            return next(images)
        except DataError:
            every, read = _flat(keys), self._answered.images.read
            named = dict.fromkeys(key.index for key in (*every, *self._answered.partners(every)))
            if self._notes_unreadable:
                note_unreadable(self.todo.store, [index for index in named if caught(functools.partial(read, index))])
            raise

    def _fill(
        self, rows: Rows, shard: Shard, keys: Sequence[ViewKey], images: Tensor, place: int | None = None
    ) -> None:
        """Fill the rows of a batch of one shard, uint8 [B, C, H, W], in the arrays that it lacks.

        Where only further teachers answer, the views must be those that the others have seen.
        """
        dataset, todo = self._inputs.views.dataset, self.todo
        indices = np.array([key.index for key in keys])
        places, kept = indices - shard.start, None if place is None else slice(place, place + len(keys))
        whole = np.arange(len(keys)) if place is None else np.zeros(self._inputs.recipe.batch_size, np.int64)
        whole[kept or slice(None)] = np.arange(len(keys))
        asked = [keys[row] for row in whole.tolist()]
        ids = [dataset.ids[key.index] for key in asked]
        pixels = to_device(images if kept is None else images[torch.from_numpy(whole)], self._inputs.device)
        labels = to_device(torch.from_numpy(dataset.labels[indices[whole]]), self._inputs.device)
        for teacher in self._inputs.teachers:
            groups = [group for group in todo.layout.of(teacher.name) if group.arrays[0].name in rows]
            if groups:
                answers, entry = teacher(pixels, labels, asked), todo.goal.teachers[teacher.name]
                require_answers(teacher, answers, entry, ids)
                fill_rows(rows, places, todo.codecs, entry, groups, answers, lambda row: f"image {ids[row]!r}", kept)
        self._record_views(rows, shard, keys, places, images)

    def _record_views(
        self, rows: Rows, shard: Shard, keys: Sequence[ViewKey], places: NDArray[np.int64], images: Tensor
    ) -> None:
        """Record checksums and parameters of the views, or compare the checksums with the recorded ones."""
        group, recorded, views = self.todo.layout.views, self.todo.checksums, self._inputs.views
        if group is not None and group.arrays[0].name in rows:
            for array in group.arrays:
                rows[array.name][places] = (
                    row_checksums(images)
                    if array.suffix == CHECKSUMS
                    else views.rows(keys, self._sizes[places + shard.start])
                )
        elif recorded is not None and shard.view < self.todo.num_recorded and self.todo.has_checksums(shard):
            require_rows(images, keys, recorded(keys), views.dataset.ids)

    @cached_property
    def _sizes(self) -> NDArray[np.int64]:
        """Heights and widths of all images, [N, 2]; a data set of files looks at every one of them each time."""
        return self._inputs.views.images.sizes()


def _flat(keys: Mapping[Shard, list[ViewKey]]) -> list[ViewKey]:
    return list(itertools.chain.from_iterable(keys.values()))


def precompute(
    recipe: PrecomputeRecipe,
    *,
    teachers: Mapping[str, nn.Module] | None = None,
    dataset: object | None = None,
    part: str | None = None,
    wait: bool = False,
    scheduler: str | None = None,
    workers: int | None = None,
) -> PrecomputeResult:
    """Fill the recipe's cache; continues earlier runs, adds views and teachers, shares the work with concurrent runs.

    `teachers` and `dataset` are objects in place of their recipe entries; `part` "i/n" computes only every n-th shard;
    `wait` returns only when the cache is complete, whichever process computes it. With the address of a Dask
    `scheduler`, or a number of `workers` on this machine, workers compute the shards: each opens data set and models
    from the recipe, and the bytes are the same. Raises MismatchError if the cache was made with another recipe,
    DataError naming an image that cannot be read, Stopped after SIGTERM or Ctrl-C; RecipeError if the scheduler does
    not respond, CacheError if workers keep dying.
    """
    started, my_part, cluster = time.perf_counter(), parse_part(part), Cluster(scheduler, workers).checked()
    if not cluster.is_here:
        _require_named(recipe, teachers or (), dataset)
    with contextlib.ExitStack() as held:
        inputs = held.enter_context(open_inputs(recipe, teachers, dataset))
        todo = held.enter_context(begun(inputs.store, functools.partial(_find_answerable, inputs, my_part)))
        if todo.recorded is None:
            remember(todo.goal.digest())
        views_per_image, done = recipe.views_per_image, Done(passes=inputs.passes)
        claims = Claims(todo.snapshot, todo.shards, views_per_image, my_part, math.inf if wait else 0.0)
        if todo.shards and cluster.is_here:
            logger.info(
                f"{len(todo.shards)} shards to do; a stop loses at most the {claims.most_lost} row-views in progress"
            )
            fill(held.enter_context(contextlib.closing(PrecomputeTask(inputs, todo))), claims, done)
        elif todo.shards:
            inputs.leave_device()
            location = recipe.cache if is_remote(recipe.cache) else str(Path(recipe.cache).absolute())
            there = inputs.recipe.model_copy(update={"cache": location})
            opener = functools.partial(open_precompute_task, there, todo.goal, todo.num_recorded)
            task = TaskOpener(PrecomputeTask.label, there, opener, views_per_image)
            fill_on_cluster(cluster, task, inputs.device, todo, claims, done)
    return result_of(todo, claims, done, started)


def _find_answerable(inputs: Inputs, part: Part) -> Todo:
    """Find what is to do; raise DataError, before anything is written, if files lack an answer to this part of it."""
    todo = find_todo(inputs)
    groups = Claims(todo.snapshot, todo.shards, inputs.recipe.views_per_image, part).groups
    for teacher in inputs.teachers:
        if isinstance(network := teacher.classifier.module, AnswersByKey):
            lacking: set[Shard] = set().union(*(todo.missing[group.name] for group in todo.layout.of(teacher.name)))
            network.require_answers([shard for shard in itertools.chain(*groups) if shard in lacking])
    return todo


def _require_named(recipe: PrecomputeRecipe, given: Collection[str], dataset: object | None) -> None:
    """Raise RecipeError unless workers can open all inputs by their entries in the recipe."""
    missing = [] if recipe.dataset is not None and dataset is None else ["dataset"]
    missing += [] if recipe.teachers else ["teachers"]
    missing += [f"teachers.{name}.model" for name, one in recipe.teachers.items() if one.model is None or name in given]
    if missing:
        raise RecipeError(
            f"the recipe does not name {', '.join(missing)}: on a cluster every worker opens these itself, objects are "
            'not sent. Fix: name them in the recipe; your own as {kind: custom, factory: "package.module:function"}'
        )


@contextlib.contextmanager
def open_precompute_task(recipe: PrecomputeRecipe, goal: Manifest, num_recorded: int) -> Iterator[PrecomputeTask]:
    """Open, in a worker, the inputs of a recipe and the client's cache, of which `goal` is the manifest to be.

    Raises unless cache, images, pixels and weights here are those of the client: a recipe names them by path.
    """
    if recipe.num_workers and multiprocessing.current_process().daemon:
        raise RecipeError(
            f"num_workers is {recipe.num_workers}, but under Dask's nanny this worker may start no processes.\n"
            "  Fix: start workers with `dask worker --no-nanny`, or DASK_DISTRIBUTED__WORKER__DAEMON=False in their "
            "environment; or render in the worker itself: --set num_workers=0"
        )
    with open_inputs(recipe) as inputs:
        cache = Cache(open_same(recipe.cache, goal))
        cache.require_dataset(inputs.views.dataset)
        store = cache.snapshot.store
        require_canaries(store, read_manifest(store), inputs.views, "strict", DEFAULT_LIMITS)
        note_other_machine(goal, inputs.device)
        for teacher in inputs.teachers:
            entry = goal.teachers[teacher.name]
            here, wanted = weights_digest(teacher.classifier.module), entry.weights
            if here != wanted:
                raise MismatchError(
                    f"teachers.{teacher.name}: its weights are {here[:8]}… here, and {wanted[:8]}… at the client.\n"
                    "  Fix: let the recipe name the same file for all"
                )
            take_recorded(teacher, entry, goal.image_shape)
        with contextlib.closing(PrecomputeTask(inputs, Todo(cache.snapshot, num_recorded=num_recorded))) as task:
            yield task
