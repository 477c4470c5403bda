"""Which losses a cache can serve: what each needs, and what the cache holds."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from logitcache.cache.cache import Cache
from logitcache.cache.encodings.head import PENULTIMATE
from logitcache.cache.format.manifest import LOGITS, StoredLogits
from logitcache.errors import RecipeError
from logitcache.student.ensembles import Ensemble
from logitcache.student.losses import Loss
from logitcache.student.losses.base import FIX_OF_ONE_CLASS, HeldTeacher, Need
from logitcache.views.datasets.base import Labels, is_multi_label

FROM_LABELS: frozenset[Need] = frozenset({"labels", "single labels", "multi labels"})
ONE_CLASS: frozenset[Need] = frozenset({"labels", "single labels"})
FROM_LOGITS: frozenset[Need] = frozenset({"logits", "dense logits"})


def asks_teacher(loss: Loss) -> bool:
    """Say whether a loss needs anything of a teacher."""
    return bool(loss.needs - FROM_LABELS or loss.features)


def shares_classes(loss: Loss) -> bool:
    """Say whether a loss compares the student's logits with the teacher's, so that both are of the same classes."""
    return bool(loss.needs & FROM_LOGITS) and "head" not in loss.needs


def held_teachers(cache: Cache) -> dict[str, HeldTeacher]:
    """Return what a cache holds of each teacher."""
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
    """Raise RecipeError listing every loss that asks for what the cache does not hold, with what would add it.

    `ensembles` of the cache's teachers, by name, may be asked too.
    """
    held = held_teachers(cache)
    lines = [
        f"losses.{number} ({loss.kind}) {reason}"
        for number, loss in enumerate(losses)
        for reason in (*_unlabelled(loss, cache), *_unanswered(loss, cache, held, ensembles))
    ]
    if lines:
        raise RecipeError(f"{cache.location} does not serve these losses:\n  " + "\n  ".join(lines))


def require_rows(losses: Sequence[Loss], num_images: int, batch_size: int, drop_last: bool) -> None:
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


def require_classes(losses: Sequence[Loss], num_classes: int, where: str = "") -> None:
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
    """Yield why the teacher's answers, as they are kept, do not serve a loss."""
    teachers = cache.manifest.teachers
    name = loss.teacher or next(iter(teachers))
    if not asks_teacher(loss):
        return
    if loss.teacher in ensembles:
        yield from _more_than_a_distribution(loss)
    elif loss.teacher is None and len(teachers) + len(ensembles) > 1:
        yield f"names no teacher, the cache has {sorted([*teachers, *ensembles])}. Fix: set `teacher`"
    elif name not in teachers:
        yield f"names teacher {name!r}, the cache has {sorted(teachers)}. Fix: one of these"
    else:
        yield from unkept_features(loss, name, held[name])
        answers = _Answers(name, teachers[name].stored_logits, cache.manifest.views.targets == "linear")
        # A head that is missing brings logits of every kind once it is added.
        brought = FROM_LOGITS if "head" in loss.needs and held[name].head is None else frozenset()
        for need in [*["features"] * bool(loss.features), *sorted(loss.needs - brought)]:
            if (reason := _CHECKS.get(need, _nothing)(answers)) is not None:
                yield f"needs {need}, the cache {reason}"


@dataclass(frozen=True)
class _Answers:
    """How a cache keeps the answers of a teacher."""

    teacher: str
    logits: StoredLogits | None
    linear: bool


def _nothing(answers: _Answers) -> str | None:
    return None


def _without_features(answers: _Answers) -> str | None:
    mixed = "mixes the answers to two images (targets: linear), and features are not mixed. Fix: kl_divergence"
    return mixed if answers.linear else None


def _without_logits(answers: _Answers) -> str | None:
    name = answers.teacher
    alone = f"keeps features of {name!r} alone. Fix: add teachers.{name}.logits to it"
    return alone if answers.logits is None else None


def _without_dense_logits(answers: _Answers) -> str | None:
    if answers.linear:
        return "mixes probabilities (targets: linear). Fix: kl_divergence"
    if answers.logits is None or "dense logits" in answers.logits.form.gives:
        return _without_logits(answers)
    return (
        f"keeps {answers.logits.form.kind} logits of {answers.teacher!r}. Fix: another loss (kl_divergence takes any), "
        f"or precompute with teachers.{answers.teacher}.logits: {{kind: dense}}"
    )


_CHECKS: dict[str, Callable[[_Answers], str | None]] = {
    "features": _without_features,
    "logits": _without_logits,
    "dense logits": _without_dense_logits,
}
"""Why a cache lacks what a loss needs of a teacher's answers; the labels and the head are checked by themselves."""


def _more_than_a_distribution(loss: Loss) -> Iterator[str]:
    """Yield what a loss asks of an ensemble, which has no logits and no features of its own."""
    features = [f"feature {name!r}" for name in loss.features]
    for need in (*sorted(loss.needs - FROM_LABELS - {"logits"}), *features):
        yield (
            f"needs {need}, the ensemble {loss.teacher!r} is a mean of probabilities. Fix: another loss (kl_divergence "
            "takes any), or set `teacher` to one of its members"
        )


def unkept_features(loss: Loss, name: str, held: HeldTeacher) -> Iterator[str]:
    """Yield which of the features that a loss asks of a teacher are not held, with the line that adds them."""
    line = f"teachers.{name}.features.{{}}: {{{{kind: {{}}, tap: …}}}}; the same command then adds it"
    for feature, kinds in loss.features.items():
        kept = held.features.get(feature)
        if kept is None and _comes_with_head(feature, kinds):
            continue  # it is asked for below
        if kept is None:
            fix = f"add to the precompute recipe: {line.format(feature, kinds[0])}"
            there = sorted(held.features) or "none"
            yield f"needs feature {feature!r} of {name!r}, the cache keeps {there}. Fix: {fix}"
        elif kept.kind not in kinds:
            fix = f"keep another beside it: {line.format(f'{feature}_{kinds[0]}', kinds[0])}"
            yield f"needs {' or '.join(kinds)}, feature {feature!r} of {name!r} is kept as {kept.kind}. Fix: {fix}"
    yield from _unkept_head(loss, name, held)


def _comes_with_head(feature: str, kinds: Collection[str]) -> bool:
    return feature == PENULTIMATE and "pooled" in kinds


def _unkept_head(loss: Loss, name: str, held: HeldTeacher) -> Iterator[str]:
    """Yield what a loss asks of a teacher's last linear layer and is not held: the layer, or what it takes in."""
    its_input = any(
        feature not in held.features and _comes_with_head(feature, kinds) for feature, kinds in loss.features.items()
    )
    layer = "head" in loss.needs and held.head is None
    if layer or its_input:
        last = f"the last linear layer of {name!r}"
        what = last if layer else f"{PENULTIMATE!r}, what {last} takes in"
        yield (
            f"needs {what}; the cache does not keep it. "
            f"Fix: precompute with teachers.{name}.logits: {{kind: head}}, which keeps it"
        )
    if "head" in loss.needs and PENULTIMATE not in loss.features:
        yield (
            f"needs what the last linear layer of {name!r} takes in, which is kept as {PENULTIMATE!r}, not as "
            f"{', '.join(map(repr, loss.features))}. Fix: set `feature: {PENULTIMATE}`"
        )
