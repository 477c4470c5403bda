"""Choose the stored form of every target: fit encodings to a calibration sample of each teacher."""

import functools
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcache.cache.encodings.base import CalibrationSample
from logitcache.cache.format.layout import Layout, layout_of
from logitcache.cache.format.manifest import LOGITS, Manifest, StoredFeature, StoredLogits, TeacherEntry
from logitcache.cache.format.metadata import table_bytes, table_problems
from logitcache.errors import CacheError
from logitcache.store.base import Store
from logitcache.targets import Targets
from logitcache.teacher.calibration import Calibration, num_calibration_rows
from logitcache.teacher.precompute_recipe import PrecomputeRecipe
from logitcache.teacher.teacher import Teacher
from logitcache.views.spec import Views

Tables = Mapping[str, NDArray[np.generic]]
"""Tables by array name, as in `net.logits.basis`."""


FitAgain = Callable[[Mapping[str, TeacherEntry], int | None, int], Tables]
"""Fits the targets without a form to a number of rows of a number of views; returns tables by array name."""


def fit(
    recipe: PrecomputeRecipe,
    views: Views,
    teachers: list[Teacher],
    entries: Mapping[str, TeacherEntry],
    examples: Mapping[str, Targets],
    num_views: int | None = None,
    most_rows: int | None = None,
    recorded_rows: int | None = None,
) -> tuple[dict[str, TeacherEntry], dict[str, NDArray[np.generic]]]:
    """Fit every target that has no form yet; return the entries with all forms, and their tables by array name.

    Calibration rows are drawn from the first `num_views` views, by default those of the recipe; `most_rows` limits
    their number. `recorded_rows` is the number of rows that a damaged table was fitted to.
    """
    spec = recipe.views.model_copy(update={"num_views": num_views or recipe.views.num_views})
    recipe = recipe.model_copy(update={"views": spec})
    fitted = dict(entries)
    tables: dict[str, NDArray[np.generic]] = {}
    for teacher in teachers:
        entry = entries.get(teacher.name)
        if entry is not None and entry.unfitted:
            sample = Calibration(recipe, views, teacher, examples[teacher.name], most_rows, recorded_rows)
            fitted[teacher.name], found = _fitted(entry, sample)
            tables |= {f"{teacher.name}.{name}": table for name, table in found.items()}
    return fitted, tables


def _fitted(entry: TeacherEntry, sample: Calibration) -> tuple[TeacherEntry, dict[str, NDArray[np.generic]]]:
    tables: dict[str, NDArray[np.generic]] = {}
    logits, features, num_views = entry.stored_logits, dict(entry.stored_features), sample.recipe.views.num_views
    for target in entry.unfitted:
        if target == LOGITS:
            logits, found = fit_logits(entry, sample, num_views, sample.wanted_rows)
        else:
            shape = tuple(sample.examples.features[target].shape[1:])
            kept = entry.features[target].fitted(functools.partial(sample.vectors, target), shape)
            found, known = kept.tables, _recorded(kept.tables, num_views, sample.wanted_rows)
            features[target] = StoredFeature(shape=shape, form=kept.form, **known)
        tables |= {f"{target}.{name}": table for name, table in found.items()}
    return entry.model_copy(update={"stored_logits": logits, "stored_features": features}), tables


def fit_logits(
    entry: TeacherEntry, sample: CalibrationSample, num_views: int, num_rows: int
) -> tuple[StoredLogits, Tables]:
    """Fit the encoding of an entry's logits to a number of rows of the first views; returns its tables by name."""
    assert entry.logits is not None
    codec = entry.logits.fitted(sample)
    recorded = _recorded(codec.tables, num_views, num_rows)
    return StoredLogits.measured(codec.form, entry.logits, **recorded), codec.tables


def _recorded(tables: Tables, num_views: int, num_rows: int) -> dict[str, Any]:
    """Return the manifest's record of tables: their digests, and the numbers of views and rows they were fitted to."""
    digests = {name: hashlib.sha256(table_bytes(table)).hexdigest() for name, table in tables.items()}
    if not digests:
        return {"tables": {}}
    return {"tables": digests, "calibration_views": num_views, "calibration_rows": num_rows}


def table_files(layout: Layout, tables: Tables) -> dict[str, bytes]:
    """Return the stored bytes of tables by key."""
    return {table.file: table_bytes(tables[table.name]) for table in layout.tables if table.name in tables}


def refit_damaged_tables(store: Store, goal: Manifest, fit_again: FitAgain) -> dict[str, bytes]:
    """Fit damaged tables again and return their bytes by key; raise CacheError if the result differs."""
    stored = {
        name: entry.restricted([target for target in entry.targets if target not in entry.unfitted])
        for name, entry in goal.teachers.items()
    }
    known = layout_of(goal.model_copy(update={"teachers": stored}))
    damaged = {problem.key for problem in table_problems(store, known.groups)}
    files: dict[str, bytes] = {}
    for group in known.groups:
        if any(table.file in damaged for table in group.tables):
            entry = stored[group.teacher].restricted([group.target])
            stored_as, unfitted = _as_asked(entry, group.target)
            rows = stored_as.calibration_rows or num_calibration_rows(entry.num_classes or 0)
            again = fit_again({group.teacher: unfitted}, stored_as.calibration_views, rows)
            files |= table_files(known, again)
    for table in known.tables:
        if table.file in damaged and hashlib.sha256(files[table.file]).hexdigest() != table.sha256:
            raise CacheError(
                f"{store}/{table.file} is damaged, and what is fitted here is another table. Fix: put back "
                f"a copy of it, or remove {store} and precompute again"
            )
    return {key: files[key] for key in damaged}


def _as_asked(entry: TeacherEntry, target: str) -> tuple[StoredLogits | StoredFeature, TeacherEntry]:
    """Return the stored form of a target, and the entry without it."""
    if target == LOGITS and entry.stored_logits is not None:
        return entry.stored_logits, entry.model_copy(update={"stored_logits": None})
    others = {name: stored for name, stored in entry.stored_features.items() if name != target}
    return entry.stored_features[target], entry.model_copy(update={"stored_features": others})
