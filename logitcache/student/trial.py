"""One step of training on copies, before the first: what fails in training mode or on the smallest batch fails here."""

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from logitcache.cache.cache import Cache
from logitcache.cache.pairs.record import Pairing
from logitcache.errors import RecipeError, caught, raise_all
from logitcache.logits import NO_LOGITS
from logitcache.models import Classifier
from logitcache.models.taps.taps import Tapped
from logitcache.reductions import ChannelLayout
from logitcache.runtime.console import logger
from logitcache.runtime.device import own_randomness
from logitcache.student.build_model import black, build_adapters, build_classifier, decide_layouts
from logitcache.student.distributed.ranks import ALONE, Ranks
from logitcache.student.ensembles import with_ensembles
from logitcache.student.learner import Terms
from logitcache.student.lesson import Lesson
from logitcache.student.optim.batch_norm import require_shared_statistics
from logitcache.student.optim.schedules import Progress
from logitcache.student.speed import lay_out, without_auto
from logitcache.student.training_recipes import StudentRecipe, TrainingRecipe
from logitcache.targets import Batch, MixedLabels, Targets
from logitcache.views.order import share_of

_REMEMBERED = 64
"""Images that a loss remembers in the trial, at most: a bank of all of them is not worth its memory."""
_PIXELS = 1 << 17
"""Pixels of a batch that is tried first; one of more is tried only if that fails."""


def smallest_batch(recipe: TrainingRecipe, lesson: Lesson, num_processes: int = 1) -> int:
    """Return the fewest images of one forward pass: of a last batch, cut for processes and into micro-batches."""
    unit = 2 if lesson.mixes else recipe.views_per_image
    last = 0 if recipe.drop_last else lesson.num_images % recipe.batch_size
    batches = {last} if lesson.num_images < recipe.batch_size else {recipe.batch_size, last}
    # Layers that normalise by the batch of all processes see all of it.
    ranks = 1 if recipe.sync_batch_norm else num_processes
    parts = [len(share_of(range(size), rank, ranks, unit)) for size in batches for rank in range(ranks)]
    micros = ((part, -(-part // recipe.micro_batches)) for part in parts if part)
    return min(part % size or size for part, size in micros)


def require_parts(recipe: TrainingRecipe, device: torch.device, ranks: Ranks) -> None:
    """Raise RecipeError for what a process cannot compute on its part of a batch."""
    if recipe.sync_batch_norm:
        require_shared_statistics(device, ranks)
    remembering = [f"losses.{n} ({loss.kind})" for n, loss in enumerate(recipe.losses) if loss.remembers_rows]
    if remembering and ranks.size > 1:
        raise RecipeError(
            f"{', '.join(remembering)} remembers every row that it saw, and each of {ranks.size} processes sees "
            "a part. Fix: one process (--nproc-per-node 1), or other losses"
        )


def require_trainable(
    recipe: TrainingRecipe,
    lesson: Lesson,
    classifier: Classifier,
    device: torch.device,
    layouts: Mapping[str, ChannelLayout],
    num_processes: int = 1,
) -> None:
    """Try a step on a copy of a model; random draws are put back. Raises RecipeError if the model or a loss fails."""
    try:
        model = copy.deepcopy(classifier)
    except Exception as cause:  # a module decides for itself how it is copied
        logger.info(f"the model cannot be copied ({cause}): its first step in training mode is the run's own")
        return
    with own_randomness(device, recipe.seed):
        _try_step(recipe, lesson, model, device, layouts, num_processes)


def require_fit(recipe: TrainingRecipe, lesson: Lesson) -> None:
    """Raise, as training would, if the model does not fit what it learns from, or fails in a step on the CPU.

    Weights are not loaded. Weights that bring their own preprocessing decide at which size the network runs: of such a
    model only the taps are looked for.
    """
    assert recipe.model is not None, "require_entries looked for it"
    architecture, cpu = recipe.model.architecture(), torch.device("cpu")
    with own_randomness(cpu, recipe.seed):
        if architecture != recipe.model and recipe.preprocessing is None:
            network = architecture.build(lesson.num_classes, lesson.image_shape[0]).module
            Tapped(network, network, [*recipe.taps, *recipe.measured_taps], who="the model")
            logger.info(
                "the model's weights are not loaded here: at the size that they ask for, training tries it first"
            )
            return
        bare = recipe.model_copy(update={"model": architecture, "precision": "float32"})
        classifier = build_classifier(bare, lesson, None)
        bare = without_auto(bare, classifier, black(lesson), cpu)
        _try_step(bare, lesson, classifier, cpu, decide_layouts(bare, classifier, black(lesson)))
        decide_layouts(bare, classifier, black(lesson), bare.measured_taps)


def require_taps(recipe: StudentRecipe, cache: Cache, pairing: Pairing | None = None) -> None:
    """Raise RecipeError listing the taps that the student does not have, whatever else is wrong."""
    counts = [entry.num_classes for entry in cache.manifest.teachers.values() if entry.num_classes is not None]
    num_classes = (*counts, cache.manifest.fingerprint.num_classes)[0]
    channels = (cache.manifest if pairing is None else pairing.record).image_shape[0]
    assert recipe.model is not None, "require_entries looked for it"
    with own_randomness(torch.device("cpu"), recipe.seed):
        network = recipe.model.architecture().build(num_classes, channels).module
    taps = [*recipe.taps, *recipe.measured_taps]
    raise_all(caught(*(partial(Tapped, network, network, [tap], "the model") for tap in taps)))


def _try_step(
    recipe: TrainingRecipe,
    lesson: Lesson,
    model: Classifier,
    device: torch.device,
    layouts: Mapping[str, ChannelLayout],
    num_processes: int = 1,
) -> None:
    """Run forward and backward in training mode on the smallest batch, on noise in the shapes of pixels and targets."""
    rows = smallest_batch(recipe, lesson, num_processes)
    first = min(rows, max(2, _least(recipe), _PIXELS // math.prod(lesson.image_shape[1:])))
    few = replace(lesson, num_images=min(lesson.num_images, _REMEMBERED))
    adapters = build_adapters(recipe, few, model, layouts).to(device)
    attempt = partial(_attempt, lesson, lay_out(model.to(device), recipe), device, layouts)
    failure = attempt(recipe, adapters, first)
    if failure is not None and first < rows:
        failure = attempt(recipe, adapters, rows)
    if failure is None:
        return
    if rows == 1 and attempt(recipe, adapters, 2) is None:
        fixes = [f"{key}: {value}" for key, value in _remedies(recipe, lesson, num_processes)]
        cut = [f"{recipe.micro_batches} micro_batches"] * (recipe.micro_batches > 1)
        cut += [f"{num_processes} processes"] * (num_processes > 1 and not recipe.sync_batch_norm)
        raise RecipeError(
            f"{lesson.num_images} images in batches of {recipe.batch_size}{' for ' * bool(cut)}{' and '.join(cut)} "
            f"leave a batch of 1, on which the model cannot train, as it can on 2: {failure}. "
            f"Fix: {', or '.join(fixes)}"
        ) from failure
    if isinstance(failure, _NotFinite):  # at any number of rows, training reports that it diverges
        return
    # The part that raises: the model alone, or the first loss that does.
    where, cause = "", attempt(recipe, None, rows)
    for number, (loss, adapter) in enumerate(zip(recipe.losses, adapters, strict=True)):
        if cause is None:
            where = f" with losses.{number} ({loss.kind})"
            cause = attempt(recipe.model_copy(update={"losses": (loss,)}), nn.ModuleList([adapter]), rows)
    if cause is None:
        where, cause = "", failure
    images = f"{rows} image{'s' * (rows > 1)} uint8 {list(lesson.image_shape)}"
    text = f"the model fails in training mode{where}, on {images}: {cause}"
    fix = "" if "Fix: " in text else ". Fix: a model that trains on such images, or another loss"
    raise RecipeError(text + fix) from failure


def _least(recipe: TrainingRecipe) -> int:
    return max(loss.min_rows for loss in recipe.losses)


class _NotFinite(ArithmeticError):
    """A loss or a gradient that is inf or nan."""


def _attempt(
    lesson: Lesson,
    model: Classifier,
    device: torch.device,
    layouts: Mapping[str, ChannelLayout],
    recipe: TrainingRecipe,
    adapters: nn.ModuleList | None,
    rows: int,
) -> Exception | None:
    """Run a step of a recipe's losses and return what it raises; without `adapters`, the model's forward pass alone."""
    taps = [] if adapters is None else recipe.taps
    tapped = Tapped(model, model.module, taps, "the model", layouts) if taps else model
    batch = _noise(recipe, lesson, rows).to(device)
    try:
        model.train()
        if adapters is None:
            tapped(batch.images)
            return None
        terms = Terms(recipe, tapped, adapters, device, ALONE).train()
        loss: Tensor = terms(batch, Progress(0, 1, recipe.epochs)).sum()
        terms.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = [parameter.grad for parameter in terms.parameters() if parameter.grad is not None]
        if not all(bool(values.detach().isfinite().all()) for values in (loss, *gradients)):
            raise _NotFinite("the loss or its gradient is not finite")
    except Exception as error:  # the model's own code may raise anything
        return error
    finally:
        if isinstance(tapped, Tapped):
            tapped.close()
    return None


def _noise(recipe: TrainingRecipe, lesson: Lesson, rows: int) -> Batch:
    """Draw a batch in the shapes of the real ones, with the labels of the first images."""
    images = torch.randint(256, (rows, *lesson.image_shape), dtype=torch.uint8)
    keys = torch.stack(
        [torch.zeros(rows, dtype=torch.int64), torch.arange(rows) % min(lesson.num_images, _REMEMBERED)], dim=1
    )
    labels = torch.from_numpy(lesson.labels[np.arange(rows) % len(lesson.labels)])
    teachers = {
        name: Targets(
            NO_LOGITS if held.num_classes is None else torch.randn(rows, held.num_classes),
            {feature: torch.rand(rows, *kept.shape) for feature, kept in held.features.items()},
        )
        for name, held in lesson.teachers.items()
    }
    mixed = MixedLabels(labels, torch.full((rows,), 0.5)) if lesson.mixes else None
    batch = Batch(images, labels, keys, teachers, mixed)
    return with_ensembles(batch, recipe.ensembles) if isinstance(recipe, StudentRecipe) else batch


def _remedies(recipe: TrainingRecipe, lesson: Lesson, num_processes: int) -> Iterator[tuple[str, Any]]:
    """Yield the changes of one key that leave no batch of one image."""

    def helps(**change: Any) -> bool:
        changed = recipe.model_copy(update=change)
        last = 0 if changed.drop_last else lesson.num_images % changed.batch_size
        is_cut = 0 < last < _least(recipe) or (changed.drop_last and lesson.num_images < changed.batch_size)
        return not is_cut and smallest_batch(changed, lesson, num_processes) > 1

    unit = 2 if lesson.mixes else recipe.views_per_image
    larger = range(recipe.batch_size - recipe.batch_size % unit + unit, 2 * recipe.batch_size + 2 * unit + 2, unit)
    if helps(drop_last=True):
        yield "drop_last", "true"
    yield from (("batch_size", size) for size in [n for n in larger if helps(batch_size=n)][:1])
    fewer = [n for n in range(recipe.micro_batches - 1, 0, -1) if helps(micro_batches=n)]
    yield from (("micro_batches", count) for count in fewer[:1])
