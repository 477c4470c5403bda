"""Which losses a cache can serve: what each needs, and what the cache holds."""

from collections.abc import Iterator, Sequence

from logitcache.cache.reader import Cache
from logitcache.errors import RecipeError
from logitcache.student.losses import Loss
from logitcache.student.losses.base import Need

FROM_LABELS: frozenset[Need] = frozenset({"labels", "single labels"})


def asks_teacher(loss: Loss) -> bool:
    """Say whether a loss needs anything of a teacher."""
    return bool(loss.needs - FROM_LABELS)


def require_served(losses: Sequence[Loss], cache: Cache) -> None:
    """Raise RecipeError listing every loss that asks for what the cache does not hold, with what would add it."""
    lines = [
        f"losses.{number} ({loss.kind}) {reason}"
        for number, loss in enumerate(losses)
        for reason in (*_unlabelled(loss, cache), *_unanswered(loss, cache))
    ]
    if lines:
        raise RecipeError(f"{cache.path} does not serve these losses:\n  " + "\n  ".join(lines))


def _unlabelled(loss: Loss, cache: Cache) -> Iterator[str]:
    if loss.needs & FROM_LABELS and not (cache.labels >= 0).any():
        yield "needs labels, the cache's images have none. Fix: leave this loss out"
    elif "single labels" in loss.needs and cache.manifest.views.mixing:
        yield (
            "needs one label an image, the cache's images are mixed. Fix: kl_divergence and cross_entropy, or "
            "precompute without views.mixing"
        )


def _unanswered(loss: Loss, cache: Cache) -> Iterator[str]:
    """Yield why the teacher's answers as they are kept do not do."""
    if not asks_teacher(loss):
        return
    teachers = cache.manifest.teachers
    if loss.teacher is None and len(teachers) > 1:
        yield f"names no teacher, the cache has {sorted(teachers)}. Fix: set `teacher`"
        return
    name = loss.teacher or next(iter(teachers))
    if name not in teachers:
        yield f"names teacher {name!r}, the cache has {sorted(teachers)}. Fix: one of these"
        return
    held = teachers[name].logits
    for need in sorted(loss.needs - FROM_LABELS):
        if need != "logits" and cache.manifest.views.targets == "linear":
            yield f"needs {need}, the cache mixes probabilities (targets: linear). Fix: kl_divergence"
        elif need not in held.gives:
            yield (
                f"needs {need}, the cache keeps {held.kind} logits of {name!r}. Fix: another loss "
                f"(kl_divergence takes any), or precompute with teachers.{name}.logits: {{kind: dense}}"
            )
