"""Sections of a report that take running the models: by class, calibration, confusion, representations."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from logitcache.report import figures
from logitcache.report.page.maps import compared, maps
from logitcache.report.page.measured import Beside, MeasuredRun
from logitcache.report.page.page import Section, Table

_MOST_CLASSES = 20
"""Classes of a confusion matrix: those that are confused most."""


def sections_of_models(runs: Sequence[MeasuredRun]) -> Iterator[Section]:
    """Yield the sections of runs that were measured."""
    notes = "\n".join(f"{run.name}: {run.note}." for run in runs if run.note)
    counted = [run for run in runs if run.tallies]
    labelled = [run for run in counted if run.tallies["student"].measures().top1 is not None]
    drawn = [] if not labelled else [_by_class(labelled), _calibration(labelled)]
    yield Section("Validation", notes, [*drawn], [Table("calibration", _errors(counted))] if counted else [])
    groups: dict[tuple[str, bytes], list[tuple[MeasuredRun, Beside]]] = {}
    for run in counted:
        if run.beside is not None:
            groups.setdefault((run.beside.source, run.beside.labels.tobytes()), []).append((run, run.beside))
    for number, members in enumerate(groups.values()):
        yield from _sections_beside(members, f" ({number + 1})" if len(groups) > 1 else "")


def _models(runs: Sequence[MeasuredRun]) -> dict[str, Any]:
    """Return the counts of all models by name: the students', then their teachers'."""
    students = {run.name: run.tallies["student"] for run in runs}
    teachers = {f"teacher {name}": tally for run in runs for name, tally in run.tallies.items() if name != "student"}
    return students | teachers


def _by_class(runs: Sequence[MeasuredRun]) -> figures.Figure:
    models = _models(runs)
    names = runs[0].class_names
    by_model = {model: tally.per_class(names) for model, tally in models.items()}
    first = next(iter(by_model.values()))
    rows = [
        {"label": one.label, "name": str(one.label) if one.name is None else one.name, "images": one.images}
        | {model: found[place].top1 for model, found in by_model.items() if place < len(found)}
        for place, one in enumerate(first)
    ]
    chosen = [*list(models)[:7], *[name for name in list(models)[7:] if name.startswith("teacher ")][:1]]
    caption = f"The classes in which {chosen[0]} is worst, of {len(rows)}." if len(rows) > figures.MOST_CLASSES else ""
    return figures.per_class(rows, chosen, caption=caption)


def _calibration(runs: Sequence[MeasuredRun]) -> figures.Figure:
    rows = [
        {
            "model": model,
            "bin": number,
            "images": int(images),
            "confidence": confidence / images if images else None,
            "accuracy": hits / images if images else None,
        }
        for model, tally in _models(runs).items()
        for number, (images, hits, confidence) in enumerate(tally.bins.tolist())
    ]
    return figures.reliability(rows, caption="Below the diagonal a model is surer than it is right.")


def _errors(runs: Sequence[MeasuredRun]) -> list[dict[str, Any]]:
    return [
        {
            "model": model,
            "images": int(tally.rows[0]),
            "top1": found.top1,
            "ece": found.ece,
            "agreement": found.agreement,
        }
        | {"kl": found.kl}
        for model, tally in _models(runs).items()
        if (found := tally.measures())
    ]


def _sections_beside(members: Sequence[tuple[MeasuredRun, Beside]], suffix: str) -> Iterator[Section]:
    """Yield confusion and representations of runs that answered the same images."""
    first = members[0][1]
    names = members[0][0].class_names
    teachers = {f"teacher {name}": values for name, values in first.teachers.items()}
    source = f"{len(first.labels)} images of {first.source}, the same for all models."
    if teachers:
        drawn = [_confusion(run.name, found, names) for run, found in members]
        yield Section(f"Confusion against the teacher{suffix}", source, drawn)
    students = {run.name: found.student for run, found in members}
    inner = {f"teacher {name}": values for name, values in first.features.items()}
    inner |= {f"{run.name}: {tap}": values for run, found in members for tap, values in found.taps.items()}
    text = (
        f"{source} Points are log-probabilities; features and taps are means over places.\n"
        "Maps of the plane mislead: distances between groups, and their sizes, mean little in t-SNE. Each is turned "
        "onto the first one; its caption has what holds in the full space."
    )
    points = teachers | students
    labels = [_class(names, label) for label in first.labels.tolist()]
    yield Section(f"Representations{suffix}", text, [*compared(points | inner), *maps(points, labels)])


def _class(names: Sequence[str] | None, label: int) -> str:
    if label < 0:
        return "no label"
    return str(label) if names is None else names[label]


def _confusion(name: str, found: Beside, names: Sequence[str] | None) -> figures.Figure:
    """Count the classes of the student by those of its first teacher."""
    teacher, answers = next(iter(found.teachers.items()))
    count = max(answers.shape[1], found.student.shape[1])
    table = np.zeros((count, count), np.int64)
    np.add.at(table, (answers.argmax(axis=1), found.student.argmax(axis=1)), 1)
    confused = table.sum(axis=0) + table.sum(axis=1) - 2 * table.diagonal()
    chosen = np.sort(np.argsort(-confused, kind="stable")[:_MOST_CLASSES])
    rows = [
        {"student": _class(names, int(c)), "teacher": _class(names, int(r)), "images": int(table[r, c])}
        for r in chosen
        for c in chosen
    ]
    agree = table.trace() / max(1, table.sum())
    caption = f"Teacher {teacher}. They agree on {100 * agree:.1f} % of the images."
    if count > _MOST_CLASSES:
        caption += f" The {_MOST_CLASSES} classes that are confused most."
    return figures.heat_map(rows, "student", "teacher", "images", title=name, caption=caption, form="{:.0f}")
