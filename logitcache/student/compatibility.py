"""Which losses a cache serves: what each needs, what the cache stores, and how exact its targets are."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from logitcache.cache.cache import Cache
from logitcache.cache.encodings.head import PENULTIMATE
from logitcache.cache.format.manifest import LOGITS, TeacherEntry
from logitcache.cache.format.row_errors import BOUND, RowErrors
from logitcache.errors import RecipeError
from logitcache.student.ensembles import Ensemble
from logitcache.student.losses import Loss
from logitcache.student.losses.base import FIX_OF_ONE_CLASS, HeldTeacher, Need
from logitcache.student.optim.schedules import TemperatureBase
from logitcache.views.datasets.base import Labels, is_multi_label

FROM_LABELS: frozenset[Need] = frozenset({"labels", "single labels", "multi labels"})
ONE_CLASS: frozenset[Need] = frozenset({"labels", "single labels"})
FROM_LOGITS: frozenset[Need] = frozenset({"logits", "raw logits"})
BEYOND = BOUND / 100
"""The bound at a temperature outside the recorded ones: the error may be larger there than at the nearest of them."""


def asks_teacher(loss: Loss) -> bool:
    """Return whether a loss needs anything of a teacher."""
    return bool(loss.needs - FROM_LABELS or loss.features)


def shares_classes(loss: Loss) -> bool:
    """Return whether a loss compares the student's logits with the teacher's, so that both are of the same classes."""
    return bool(loss.needs & FROM_LOGITS) and "head" not in loss.needs


def held_teachers(cache: Cache) -> dict[str, HeldTeacher]:
    """Return what a cache stores of each teacher."""
    return {
        name: HeldTeacher(
            entry.num_classes if entry.logits is not None else None, cache.features(name), cache.head(name)
        )
        for name, entry in cache.manifest.teachers.items()
    }


def asked_targets(
    losses: Sequence[Loss], ensembles: Mapping[str, Ensemble], held: Mapping[str, HeldTeacher]
) -> dict[str, list[str]]:
    """Return what the losses read of each teacher: its logits, and names of features."""
    asked: dict[str, list[str]] = {}
    with_logits = [name for name, teacher in held.items() if teacher.num_classes is not None]
    for loss in filter(asks_teacher, losses):
        logits = [LOGITS] if loss.needs - FROM_LABELS else []
        ensemble = ensembles.get(loss.teacher or "")
        names = [loss.teacher or next(iter(held))] if ensemble is None else ensemble.teachers or with_logits
        for name in names:
            asked[name] = [*asked.get(name, ()), *logits, *loss.features]
    return {name: list(dict.fromkeys(targets)) for name, targets in asked.items()}


def require_served(losses: Sequence[Loss], cache: Cache, ensembles: Collection[str] = ()) -> None:
    """Raise RecipeError listing every loss that needs what the cache does not store, with what would add it.

    `ensembles`: names of ensembles of the cache's teachers, which losses may name too.
    """
    held = held_teachers(cache)
    lines = [
        f"losses.{number} ({loss.kind}) {reason}"
        for number, loss in enumerate(losses)
        for reason in (*_unlabelled(loss, cache), *_unanswered(loss, cache, held, ensembles))
    ]
    if lines:
        raise RecipeError(f"{cache.location} does not serve these losses:\n  " + "\n  ".join(lines))


def require_batch_rows(losses: Sequence[Loss], num_images: int, batch_size: int, drop_last: bool) -> None:
    """Raise RecipeError for losses that compare more images than the last batch of an epoch has."""
    last = num_images % batch_size
    if drop_last or not last:
        return
    lines = [
        f"losses.{number} ({loss.kind}) takes {loss.min_rows} or more"
        for number, loss in enumerate(losses)
        if last < loss.min_rows
    ]
    if lines:
        raise RecipeError(
            f"{num_images} images in batches of {batch_size} leave a last batch of {last}, too few for losses that "
            "compare images with one another:\n  "
            + "\n  ".join(lines)
            + "\n  Fix: drop_last: true, or another batch_size"
        )


def other_labels(loss: Loss, labels: Labels) -> Iterator[str]:
    """Yield why labels of a kind, one class an image or any number of them, are not what a loss asks for."""
    if is_multi_label(labels) and loss.needs & ONE_CLASS:
        yield (
            "needs labels of one class an image, these images are of any number. Fix: binary_cross_entropy or "
            "multi_label_kl, with a temperature that needs no labels"
        )
    elif is_multi_label(labels) and loss.exclusive:
        yield "takes images to be of one class, these are of any number. Fix: multi_label_kl, or mean_squared_error"
    elif "multi labels" in loss.needs and not is_multi_label(labels) and (labels >= 0).any():
        yield (
            "needs labels of any number of classes an image, these images are of one. Fix: cross_entropy, or a data "
            "set whose labels are vectors with 1 or 0 for each class"
        )


def require_labels(losses: Sequence[Loss], labels: Labels, where: str = "") -> None:
    """Raise RecipeError for losses that ask for labels of another kind than those of images."""
    for number, loss in enumerate(losses):
        for reason in other_labels(loss, labels):
            raise RecipeError(f"{where}losses.{number} ({loss.kind}) {reason}")


def require_softmax_classes(losses: Sequence[Loss], num_classes: int, where: str = "") -> None:
    """Raise RecipeError for losses that take a softmax over fewer than two classes, which trains nothing."""
    names = [
        f"losses.{number} ({loss.kind})"
        for number, loss in enumerate(losses)
        if loss.exclusive or loss.needs & ONE_CLASS
    ]
    if names and num_classes < 2:
        raise RecipeError(
            f"{where}a softmax over {num_classes} class is constant, and trains nothing by {', '.join(names)}. "
            f"{FIX_OF_ONE_CLASS}"
        )


def _unlabelled(loss: Loss, cache: Cache) -> Iterator[str]:
    """Yield why the labels of a cache's images do not serve a loss."""
    if loss.needs & FROM_LABELS and not (cache.labels >= 0).any():
        yield "needs labels, the cache's images have none. Fix: leave this loss out"
        return
    yield from other_labels(loss, cache.labels)
    if "single labels" in loss.needs and cache.manifest.views.mixing:
        yield (
            "needs one label an image, the cache's images are mixed. Fix: kl_divergence and cross_entropy, or "
            "precompute without views.mixing"
        )


def _unanswered(loss: Loss, cache: Cache, held: Mapping[str, HeldTeacher], ensembles: Collection[str]) -> Iterator[str]:
    """Yield why the teacher's answers, as they are stored, do not serve a loss."""
    name = loss.teacher or next(iter(held))
    if not asks_teacher(loss):
        return
    if loss.teacher in ensembles:
        # An ensemble has no logits and no features of its own.
        features = [f"feature {feature!r}" for feature in loss.features]
        for need in (*sorted(loss.needs - FROM_LABELS - {"logits"}), *features):
            yield (
                f"needs {need}, the ensemble {name!r} is a mean of probabilities. Fix: another loss (kl_divergence "
                "takes any), or set `teacher` to one of its members"
            )
    elif loss.teacher is None and len(held) + len(ensembles) > 1:
        yield f"names no teacher, the cache has {sorted([*held, *ensembles])}. Fix: set `teacher`"
    elif name not in held:
        yield f"names teacher {name!r}, the cache has {sorted(held)}. Fix: one of these"
    else:
        yield from unkept_features(loss, name, held[name])
        answers = name, cache.manifest.teachers[name], cache.manifest.views.targets == "linear"
        # A head that is missing brings logits of every kind once it is added.
        brought = FROM_LOGITS if "head" in loss.needs and held[name].head is None else frozenset()
        for need in [*["features"] * bool(loss.features), *sorted(loss.needs - brought)]:
            if need in _CHECKS and (reason := _CHECKS[need](*answers)) is not None:
                yield f"needs {need}, the cache {reason}"


def _check_features(teacher: str, entry: TeacherEntry, linear: bool) -> str | None:
    mixed = "mixes the answers to two images (targets: linear), and features are not mixed. Fix: kl_divergence"
    return mixed if linear else None


def _check_logits(teacher: str, entry: TeacherEntry, linear: bool) -> str | None:
    alone = f"keeps features of {teacher!r} alone. Fix: add teachers.{teacher}.logits to it"
    return alone if entry.logits is None else None


def _check_raw_logits(teacher: str, entry: TeacherEntry, linear: bool) -> str | None:
    stored = entry.stored_logits
    if linear:
        return "mixes probabilities (targets: linear). Fix: kl_divergence"
    if stored is None or "raw logits" in stored.form.gives:
        return _check_logits(teacher, entry, linear)
    return (
        f"keeps {stored.form.kind} logits of {teacher!r}. Fix: another loss (kl_divergence takes any), "
        f"or precompute with teachers.{teacher}.logits: {{kind: dense}}"
    )


_CHECKS: dict[str, Callable[[str, TeacherEntry, bool], str | None]] = {
    "features": _check_features,
    "logits": _check_logits,
    "raw logits": _check_raw_logits,
}
"""What the cache lacks, by what a loss needs of a teacher's answers; labels and heads have checks of their own."""


def unkept_features(loss: Loss, name: str, held: HeldTeacher) -> Iterator[str]:
    """Yield which features, or which last linear layer, a loss needs that are not stored of a teacher, with the fix."""
    line = f"teachers.{name}.features.{{}}: {{{{kind: {{}}, tap: …}}}}; the same command then adds it"
    last, takes_head = f"the last linear layer of {name!r}", "head" in loss.needs
    missing = [last] if takes_head and held.head is None else []
    for feature, kinds in loss.features.items():
        kept = held.features.get(feature)
        if kept is None and feature == PENULTIMATE and "pooled" in kinds:  # stored with the head
            missing.append(f"{PENULTIMATE!r}, what {last} takes in")
        elif kept is None:
            fix = f"add to the precompute recipe: {line.format(feature, kinds[0])}"
            there = sorted(held.features) or "none"
            yield f"needs feature {feature!r} of {name!r}, the cache keeps {there}. Fix: {fix}"
        elif kept.kind not in kinds:
            fix = f"keep another beside it: {line.format(f'{feature}_{kinds[0]}', kinds[0])}"
            yield f"needs {' or '.join(kinds)}, feature {feature!r} of {name!r} is kept as {kept.kind}. Fix: {fix}"
    if missing:
        yield (
            f"needs {missing[0]}; the cache does not keep it. "
            f"Fix: precompute with teachers.{name}.logits: {{kind: head}}, which keeps it"
        )
    if takes_head and PENULTIMATE not in loss.features:
        yield (
            f"needs what {last} takes in, which is kept as {PENULTIMATE!r}, not as "
            f"{', '.join(map(repr, loss.features))}. Fix: set `feature: {PENULTIMATE}`"
        )


def inexact_targets(losses: Sequence[Loss], ensembles: Mapping[str, Ensemble], cache: Cache) -> Iterator[str]:
    """Yield which losses have targets with errors above the bound, by what the cache records, each with the fix."""
    held = held_teachers(cache)
    for number, loss in enumerate(losses):
        for name in asked_targets([loss], ensembles, held) if shares_classes(loss) else ():
            if reason := _inexact(loss, name, cache.manifest.teachers[name]):
                yield f"losses.{number} ({loss.kind}): {reason}"


def target_error(losses: Sequence[Loss], ensembles: Mapping[str, Ensemble], cache: Cache) -> float | None:
    """Return the largest recorded error of the targets at the losses' temperatures, times T², in nats."""
    held = held_teachers(cache)
    names = {
        number: asked_targets([loss], ensembles, held) if shares_classes(loss) else ()
        for number, loss in enumerate(losses)
    }
    found = (_worst(losses[number], cache.manifest.teachers[name]) for number, asked in names.items() for name in asked)
    return max((one.scaled for one in found if one is not None), default=None)


def _recorded(entry: TeacherEntry) -> list[RowErrors]:
    return [one for one in entry.errors_of(LOGITS) if one.temperature is not None]  # ascending


def _temperatures(loss: Loss) -> tuple[float, float]:
    """Return the lowest and the highest temperature of a loss, 1 if it has none."""
    temperature = getattr(loss, "temperature", None)
    return temperature.bounds if isinstance(temperature, TemperatureBase) else (1.0, 1.0)


def _worst(loss: Loss, entry: TeacherEntry) -> RowErrors | None:
    """Return the largest error of a teacher's logits at the temperatures of a loss; None if none is recorded."""
    recorded, (lowest, highest) = _recorded(entry), _temperatures(loss)
    temperatures = [one.temperature or 0.0 for one in recorded]
    start = max((n for n, at in enumerate(temperatures) if at <= lowest), default=0)
    stop = min((n for n, at in enumerate(temperatures) if at >= highest), default=len(recorded) - 1)
    return max(recorded[start : stop + 1], key=lambda one: one.scaled, default=None)


def _inexact(loss: Loss, name: str, entry: TeacherEntry) -> str | None:
    """Describe the errors of a teacher's logits at the temperatures of a loss; None if they are within the bound."""
    worst, (lowest, highest) = _worst(loss, entry), _temperatures(loss)
    if worst is None:
        return None
    temperatures = [one.temperature or 0.0 for one in _recorded(entry)]
    bound, what = BOUND, f"the bound is {BOUND:g}"
    if not temperatures[0] <= lowest <= highest <= temperatures[-1]:
        span = f"{lowest:.3g}" if lowest == highest else f"{lowest:.3g} to {highest:.3g}"
        bound = BEYOND
        what = f"no errors are recorded at T = {span}, only from {temperatures[0]:g} to {temperatures[-1]:g}"
    if worst.scaled <= bound:
        return None
    assert entry.stored_logits is not None
    fix = f"teachers.{name}.logits: {{kind: dense, dtype: float32}}, which loses nothing"
    if lowest == highest:  # the smallest encoding that stays below the bound, on further images too
        fix += f", or {{kind: auto, max_kl: {BOUND / 2 / highest**2:.2g}, temperature: {highest:g}}}"
    return (
        f"the {entry.stored_logits.form.kind} logits of {name!r} differ from the teacher's by a mean KL divergence of "
        f"{worst.mean:.2g} nats at T = {worst.temperature:g}, {worst.scaled:.2g} times T²; {what}. "
        f"Fix: precompute with {fix}"
    )
