"""Stage one: run the teachers once over every view and keep their answers."""

import contextlib
import functools
import math
import multiprocessing
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from torch import nn

from logitcache.cache.cache import Cache
from logitcache.cache.format.manifest import Manifest
from logitcache.config.trust import remember
from logitcache.errors import MismatchError, RecipeError
from logitcache.models import weights_digest
from logitcache.runtime.console import logger
from logitcache.stage_one.claims import Claims, parse_part
from logitcache.stage_one.cluster.cluster import Cluster
from logitcache.stage_one.cluster.fill_on_cluster import TaskOpener, fill_on_cluster, open_same
from logitcache.stage_one.inputs import open_inputs
from logitcache.stage_one.lifecycle import PrecomputeResult, begun, result_of
from logitcache.stage_one.loop import Done, fill
from logitcache.stage_one.precompute_task import PrecomputeTask
from logitcache.stage_one.todo import Todo, find_todo
from logitcache.store.remote.client import is_remote
from logitcache.teacher.precompute_recipe import PrecomputeRecipe

__all__ = ["PrecomputeRecipe", "PrecomputeResult", "precompute"]


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
    """Fill the recipe's cache; continues where earlier runs stopped, adds views and teachers, shares with other runs.

    `teachers` and `dataset` give the objects themselves in place of their recipe entries; `part` "i/n" takes only each
    n-th shard; `wait` returns only when the cache is whole, whichever process computes it. The shards are computed by
    the workers of a Dask cluster with the address of its `scheduler`, or with so many `workers` of this machine: each
    opens data set and models by the recipe, and the bytes are the same. Raises MismatchError if the cache was made by
    another recipe, DataError naming an image that cannot be read, Stopped after SIGTERM or Ctrl-C; RecipeError if no
    scheduler answers, CacheError if workers keep dying.
    """
    started, my_part, cluster = time.perf_counter(), parse_part(part), Cluster(scheduler, workers).checked()
    if not cluster.is_here:
        _require_named(recipe, teachers or (), dataset)
    with contextlib.ExitStack() as held:
        inputs = held.enter_context(open_inputs(recipe, teachers, dataset))
        todo = held.enter_context(begun(inputs.store, functools.partial(find_todo, inputs)))
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
        cache.require_canaries(inputs.views)
        for teacher in inputs.teachers:
            here, wanted = weights_digest(teacher.classifier.module), goal.teachers[teacher.name].weights
            if here != wanted:
                raise MismatchError(
                    f"teachers.{teacher.name}: its weights are {here[:8]}… here, and {wanted[:8]}… at the client.\n"
                    "  Fix: let the recipe name the same file for all"
                )
        with contextlib.closing(PrecomputeTask(inputs, Todo(cache.snapshot, num_recorded=num_recorded))) as task:
            yield task
