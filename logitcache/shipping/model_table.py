"""One table of models on the same images: runs, exported files and their teachers."""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from logitcache.config.recipe import NOWHERE, is_stated, load_recipe
from logitcache.errors import RecipeError
from logitcache.models import Run, read_stored, weights_digest
from logitcache.runtime.device import Precision, autocast, resolve_device
from logitcache.shipping.exported import ExportedModel, is_exported, open_exported
from logitcache.shipping.parity import predictions_of
from logitcache.student.evaluation.cost import (
    Contender,
    LatencyPlan,
    count_bytes,
    count_flops,
    count_parameters,
    failing,
    median_seconds,
)
from logitcache.student.evaluation.open_run import load_run, open_recorded_validator, open_run, read_run, require_memory
from logitcache.student.evaluation.validation import AnyMeasures, AnyTally, Validator
from logitcache.student.runs.run_directory import RunDirectory
from logitcache.student.runs.trained import Evaluation, read_evaluation
from logitcache.student.training_recipes import TeacherRecipe

_FLOPS_OF_MAC = 2
_TEACHER = "teacher "


@dataclass(frozen=True)
class ModelLatency:
    """The median seconds of a batch, all models in turns.

    `speed_up` is the time of the teacher over it, of several teachers that of all; None if one cannot be timed.
    """

    batch_size: int
    threads: int
    seconds: float
    speed_up: float | None


@dataclass(frozen=True)
class ModelRow:
    """A model of the table.

    `parent` is the model of the table that it was made from, and `parent_agreement` the fraction of images with the
    same answer. `retention` is its top-1 over its teacher's, of images of any number of classes the mean average
    precision; teachers have neither agreement nor retention. `macs` are the multiply-adds for an image. `bytes` are
    those of the weights of a run, of a file, or of the parameters and buffers of a teacher. None for what is not known.
    """

    model: str
    parent: str | None
    arithmetic: str
    measures: AnyMeasures | None
    parent_agreement: float | None
    retention: float | None
    num_parameters: int | None
    macs: int | None
    bytes: int | None
    latencies: tuple[ModelLatency, ...] = ()


@dataclass(frozen=True)
class ModelTable:
    """Models measured on the same images; `teachers_left_out`: why a teacher is neither counted nor timed."""

    images: int
    device: str
    models: tuple[ModelRow, ...]
    teachers_left_out: Mapping[str, str] = field(default_factory=dict)
    teachers_failed: tuple[str, ...] = ()


class _Model(NamedTuple):
    """A model to measure: its row without figures, and the digests by which it and its parent are known."""

    row: ModelRow
    module: nn.Module
    precision: Precision
    evaluation: Evaluation | None
    num_classes: int
    digests: tuple[str, ...]
    parent: str | None
    with_threads: Callable[[int], nn.Module]


class _Opened(NamedTuple):
    models: list[_Model]
    validator: Validator
    device: torch.device


def compare_models(
    models: Sequence[str | Path],
    overrides: Sequence[str] = (),
    *,
    latency: LatencyPlan | None = None,
    teachers: Mapping[str, Contender | None] | None = None,
) -> ModelTable:
    """Measure runs and exported files, which take device=cpu, on the validation images of the first run.

    `overrides` name other images, as for `evaluate`; files alone need them. `teachers` that are at hand are weighed
    and timed beside them. Raises RecipeError for models that do not take the same images, and as `evaluate`.
    """
    opened = _open(list(dict.fromkeys(map(str, models))), overrides)
    _require_alike(opened.models, overrides)
    image = opened.validator.sample()[0].to(opened.device)
    beside = dict(teachers or {})
    left_out = failing(beside, image)
    beside |= dict.fromkeys(left_out)
    parents = _parents(opened.models)
    found, shared = _measured(opened, parents)
    rows = [
        replace(model.row, parent=parents.get(model.row.model), parent_agreement=shared.get(model.row.model))
        for model in opened.models
    ]
    known = dict.fromkeys([*beside, *(name.removeprefix(_TEACHER) for name in found if name.startswith(_TEACHER))])
    rows += [_teacher_row(name, beside.get(name), image) for name in known]
    rows = [_with_measures(row, found.get(row.model)) for row in rows]
    if latency is not None:
        timed = _latencies(opened.models, beside, image, latency)
        rows = [replace(row, latencies=tuple(timed.get(row.model, ()))) for row in rows]
    return ModelTable(opened.validator.num_images, str(opened.device), tuple(rows), left_out)


def _open(names: Sequence[str], overrides: Sequence[str]) -> _Opened:
    """Open all models, and the images of the first run, or those that `overrides` name."""
    files = {name: open_exported(name) for name in names if is_exported(name)}
    runs = [Path(name) for name in names if name not in files]
    if runs:
        first = open_run(runs[0], overrides)
        recipe, validator, device = first.recipe, first.validator, first.device
    else:
        metadata = files[names[0]].metadata
        loss = "binary_cross_entropy" if metadata.multi_label else "cross_entropy"
        recipe = load_recipe({"out": NOWHERE, "epochs": 1, "losses": [{"kind": loss}]}, TeacherRecipe, overrides)
        validator = open_recorded_validator(names[0], recipe, metadata.evaluation, metadata.num_classes)
        device = resolve_device(recipe.device)
    assert recipe.validation is not None, "or there would be no images"
    batch, image = min(recipe.validation.batch_size, validator.num_images), validator.sample()[0].to(device)
    found = [_file(name, files[name]) if name in files else _run(Path(name), overrides, batch, image) for name in names]
    return _Opened(found, validator, device)


def _run(run: Path, overrides: Sequence[str], batch: int, image: Tensor) -> _Model:
    recipe = read_run(run, overrides)
    classifier = load_run(run, recipe, overrides)
    require_memory(run, classifier, batch, image.device.type, "--set validation.batch_size=")
    parent = RunDirectory(str(run)).environment().learns_from.get("parent")
    digest = parent.get("weights") if isinstance(parent, dict) else None
    weighed = count_parameters(classifier), count_flops(classifier, image) // _FLOPS_OF_MAC
    size = (run / "weights.safetensors").stat().st_size
    return _Model(
        row=ModelRow(str(run), None, recipe.precision, None, None, None, *weighed, size),
        module=classifier,
        precision=recipe.precision,
        evaluation=read_evaluation(run),
        num_classes=read_stored(run / "model.json").num_classes,
        digests=(Run(path=str(run)).parent()["weights"], weights_digest(classifier.module)),
        parent=digest if isinstance(digest, str) else None,
        with_threads=lambda threads: classifier,
    )


def _file(name: str, file: ExportedModel) -> _Model:
    metadata, run = file.metadata, file.metadata.run
    macs = None if run.flops is None else run.flops // _FLOPS_OF_MAC
    row = ModelRow(name, None, metadata.arithmetic, None, None, None, run.num_parameters, macs, len(file.data))
    return _Model(
        row=row,
        module=file.session(),
        precision="float32",
        evaluation=metadata.evaluation,
        num_classes=metadata.num_classes,
        digests=(),
        parent=run.weights,
        with_threads=file.session,
    )


def _teacher_row(name: str, teacher: Contender | None, image: Tensor) -> ModelRow:
    row = ModelRow(_TEACHER + name, None, "-", None, None, None, None, None, None)
    if teacher is None:
        return row
    return replace(
        row,
        arithmetic=teacher.precision,
        num_parameters=count_parameters(teacher.model),
        macs=count_flops(teacher.model, teacher.pixels_like(image)) // _FLOPS_OF_MAC,
        bytes=count_bytes(teacher.model),
    )


def _require_alike(models: Sequence[_Model], overrides: Sequence[str]) -> None:
    """Raise RecipeError for models of other classes than the first, or evaluated on other pixels of an image."""
    first = models[0]
    for other in models[1:]:
        both = [model.evaluation for model in (first, other) if model.evaluation is not None]
        names = [evaluation.class_names for evaluation in both if evaluation.class_names is not None]
        pair = f"'{first.row.model}' and '{other.row.model}'"
        if first.num_classes != other.num_classes or any(each != names[0] for each in names):
            raise RecipeError(f"{pair} predict other classes. Fix: models of the same data")
        if is_stated("validation.augmentations", overrides):
            continue
        if any(each.augmentations != both[0].augmentations for each in both):
            raise RecipeError(
                f"{pair} were evaluated through other augmentations. Fix: --set validation.augmentations=[…], for all"
            )


def _parents(models: Sequence[_Model]) -> dict[str, str]:
    """Return the name of the model that each was made from, if that is among them."""
    by_digest = {digest: model.row.model for model in models for digest in model.digests}
    return {model.row.model: by_digest[model.parent] for model in models if model.parent in by_digest}


@torch.no_grad()
def _measured(opened: _Opened, parents: Mapping[str, str]) -> tuple[dict[str, AnyMeasures], dict[str, float]]:
    """Let all models answer all images: return figures by name, teachers' too, and agreement with the parent."""
    validator, tallies = opened.validator, dict[str, list[AnyTally]]()
    equal, answers = dict.fromkeys(parents, 0), dict.fromkeys(parents, 0)
    for batch in validator.batches(opened.device, "compare"):
        logits = {}
        for model in opened.models:
            with autocast(opened.device, model.precision):
                logits[model.row.model] = model.module(batch.images).float()
        for child, parent in parents.items():
            same = predictions_of(logits[child], validator.is_multi_label)
            same = same == predictions_of(logits[parent], validator.is_multi_label)
            equal[child], answers[child] = equal[child] + int(same.sum()), answers[child] + same.numel()
        for name, targets in batch.teachers.items():
            if not validator.is_multi_label:
                logits[_TEACHER + name] = targets.log_probs()
            elif targets.keeps_logits:
                logits[_TEACHER + name] = targets.logits
        for name, values in logits.items():
            tallies.setdefault(name, []).append(validator.counts(values, batch))
    measures = {name: reduce(operator.add, parts).measures() for name, parts in tallies.items()}
    for name in measures.keys() - {model.row.model for model in opened.models}:
        measures[name] = replace(measures[name], agreement=None, kl=None)
    return measures, {child: equal[child] / answers[child] for child in parents}


def _with_measures(row: ModelRow, measures: AnyMeasures | None) -> ModelRow:
    if measures is None:
        return row
    own = None if row.model.startswith(_TEACHER) else measures.quality
    teacher = measures.teacher_quality
    return replace(row, measures=measures, retention=None if own is None or not teacher else own / teacher)


def _latencies(
    models: Sequence[_Model], teachers: Mapping[str, Contender | None], image: Tensor, plan: LatencyPlan
) -> dict[str, list[ModelLatency]]:
    """Time all models in turns; return the rows by name."""
    at_hand = {_TEACHER + name: teacher for name, teacher in teachers.items() if teacher is not None}
    rows: dict[str, list[ModelLatency]] = {}
    for threads, pixels in plan.batches(image):
        timed = {model.row.model: Contender(model.with_threads(threads), model.precision) for model in models} | at_hand
        measured = median_seconds([(one, pixels) for one in timed.values()], threads, plan.warm_up, plan.repeats)
        seconds = dict(zip(timed, measured, strict=True))
        is_known = bool(teachers) and len(at_hand) == len(teachers)
        of_teachers = sum(seconds[name] for name in at_hand) if is_known else None
        for name, taken in seconds.items():
            faster = None if of_teachers is None else of_teachers / taken
            rows.setdefault(name, []).append(ModelLatency(len(pixels), threads, taken, faster))
    return rows
