"""How far the targets of a loss are from what the teacher answered, by what the cache records."""

from collections.abc import Iterator

from logitcache.cache.cache import Cache
from logitcache.cache.format.manifest import LOGITS, TeacherEntry
from logitcache.cache.format.row_errors import BOUND, RowErrors
from logitcache.student.compatibility import asked_targets, held_teachers, shares_classes
from logitcache.student.losses import Loss
from logitcache.student.optim.schedules import TemperatureBase
from logitcache.student.training_recipes import StudentRecipe

BEYOND = BOUND / 100
"""The bound at a temperature outside those recorded, where the error may be larger than at the nearest of them."""


def doubts(recipe: StudentRecipe, cache: Cache) -> Iterator[str]:
    """Yield what is to be known of the targets of a recipe's losses: errors above the bound, each with the fix."""
    held = held_teachers(cache)
    for number, loss in enumerate(recipe.losses):
        if shares_classes(loss):
            for name in asked_targets([loss], recipe.ensembles, held):
                doubt = _doubt(loss, name, cache.manifest.teachers[name])
                if doubt is not None:
                    yield f"losses.{number} ({loss.kind}): {doubt}"


def _doubt(loss: Loss, name: str, entry: TeacherEntry) -> str | None:
    """Say what is wrong with the logits of a teacher at the temperatures of a loss; None if nothing is known to be."""
    recorded = [one for one in entry.errors_of(LOGITS) if one.temperature is not None]
    if not recorded:
        return None
    lowest, highest = _temperatures(loss)
    around = _around(recorded, lowest, highest)
    worst = max(around, key=lambda one: one.scaled)
    first, last = (one.temperature or 0.0 for one in (recorded[0], recorded[-1]))
    if first <= lowest and highest <= last:
        if worst.scaled <= BOUND:
            return None
        what = f"the bound is {BOUND:g}"
    else:
        if worst.scaled <= BEYOND:
            return None
        span = f"{lowest:.3g}" if lowest == highest else f"{lowest:.3g} to {highest:.3g}"
        what = f"no errors are recorded at T = {span}, only from {first:g} to {last:g}"
    assert entry.stored_logits is not None
    fix = f"teachers.{name}.logits: {{kind: dense, dtype: float32}}, which loses nothing"
    if lowest == highest:  # the smallest encoding that stays below the bound, on further images too
        fix += f", or {{kind: auto, max_kl: {BOUND / 2 / highest**2:.2g}, temperature: {highest:g}}}"
    return (
        f"the {entry.stored_logits.form.kind} logits of {name!r} differ from the teacher's by a mean KL divergence of "
        f"{worst.mean:.2g} nats at T = {worst.temperature:g}, {worst.scaled:.2g} times T²; {what}. "
        f"Fix: precompute with {fix}"
    )


def _temperatures(loss: Loss) -> tuple[float, float]:
    """Return the lowest and the highest temperature of a loss at any time; 1 for a loss without one."""
    temperature = getattr(loss, "temperature", None)
    return temperature.bounds if isinstance(temperature, TemperatureBase) else (1.0, 1.0)


def _around(recorded: list[RowErrors], lowest: float, highest: float) -> list[RowErrors]:
    """Return the errors at the temperatures that enclose an interval, and within it; they ascend by temperature."""
    temperatures = [one.temperature or 0.0 for one in recorded]
    start = max((n for n, at in enumerate(temperatures) if at <= lowest), default=0)
    stop = min((n for n, at in enumerate(temperatures) if at >= highest), default=len(recorded) - 1)
    return recorded[start : stop + 1]
