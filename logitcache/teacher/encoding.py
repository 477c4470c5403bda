"""Encode a teacher's answers into the rows of a shard, with the error of every row."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from logitcache.cache.encodings.measure import divergences
from logitcache.cache.format.arrays import ArrayGroup, Rows
from logitcache.cache.format.manifest import LOGITS, TeacherEntry
from logitcache.cache.format.row_errors import count_errors
from logitcache.cache.read.target_codecs import TargetCodecs
from logitcache.errors import DataError, RowError
from logitcache.targets import FeatureValues, Targets, feature_values
from logitcache.teacher.teacher import first_not_finite


class Encoded(NamedTuple):
    """The arrays of a target by suffix, [B, ...] each, and the errors of its rows, [K, B] at K temperatures, if any."""

    arrays: dict[str, Tensor]
    errors: Tensor | None


def fill_rows(
    rows: Rows,
    places: slice | NDArray[np.int64],
    codecs: TargetCodecs,
    entry: TeacherEntry,
    groups: Sequence[ArrayGroup],
    answers: Targets,
    name_of: Callable[[int], str],
    kept: slice | None = None,
) -> None:
    """Encode a batch's answers on the device they are on, and copy what `groups` keep to their places in a shard.

    Of the rows of the batch only `kept` ones are copied, by default all. Raises DataError naming, as `name_of` does,
    the first row that cannot be encoded, or does not fit its stored dtype.
    """
    encoded = _encode(codecs, entry, groups, answers, name_of)
    for target, (arrays, _) in encoded.items():
        _require_fits(groups[0].teacher, entry, target, arrays, name_of)
    for group in groups:
        arrays, errors = encoded[group.target]
        for array in group.rows:
            rows[array.name][places] = arrays[array.suffix][kept or slice(None)].cpu().numpy()
        if group.errors is not None and errors is not None:
            count_errors(rows[group.errors.name][0], errors[:, kept or slice(None)], by_row=kept is not None)


def _require_fits(
    teacher: str, entry: TeacherEntry, target: str, encoded: Mapping[str, Tensor], name_of: Callable[[int], str]
) -> None:
    needed = {} if entry.stored_logits is None else entry.stored_logits.form.needs
    for suffix, values in encoded.items():
        row = first_not_finite(values)
        if row is not None:
            what, fix = f"the feature {target!r}", f"features.{target}.dtype: float32"
            if target == LOGITS:
                what, fix = suffix or "a logit", "logits: {kind: dense, dtype: float32}"
            elif target in needed:
                fix = "logits: {kind: head, dtype: float32}"
            raise DataError(
                f"teacher {teacher!r}: {what} of {name_of(row)} does not fit {values.dtype}, whose largest number is "
                f"{torch.finfo(values.dtype).max:.6g}.\n  Fix: teachers.{teacher}.{fix}"
            )


def _encode(
    codecs: TargetCodecs,
    entry: TeacherEntry,
    groups: Sequence[ArrayGroup],
    answers: Targets,
    name_of: Callable[[int], str],
) -> dict[str, Encoded]:
    """Encode answers by target: those of `groups`, and those that they need."""
    teacher = groups[0].teacher
    measured = {group.target: group.errors is not None for group in groups}
    needed = {} if entry.stored_logits is None or LOGITS not in measured else entry.stored_logits.form.needs
    found: dict[str, Encoded] = {}
    for name in entry.features:
        if name in measured or name in needed:
            codec, exact = codecs.features[f"{teacher}.{name}"], answers.features[name]
            arrays = codec.encode(exact)
            errors = relative_error(codec.decode(arrays), exact)[None] if measured.get(name) else None
            found[name] = Encoded(arrays, errors)
    if LOGITS in measured:
        assert entry.logits is not None
        assert entry.num_classes is not None
        assert isinstance(answers.logits, Tensor)
        logits = codecs.logits[f"{teacher}.{LOGITS}"]
        try:
            arrays = logits.encode(answers.logits)
        except RowError as error:
            raise DataError(f"teacher {teacher!r}, {name_of(error.row)}: {error.why}") from error
        errors = None
        if measured[LOGITS]:
            kept = {name: found[name].arrays[""] for name in needed}
            back = logits.decode({**kept, **arrays}, entry.num_classes)
            temperatures = entry.error_temperatures or ()
            errors = torch.stack([divergences(answers.logits, back, at) for at in temperatures])
        found[LOGITS] = Encoded(arrays, errors)
    return found


def relative_error(decoded: FeatureValues, exact: Tensor) -> Tensor:
    """Return the squared error of each row over its squares, [B], of decoded features and exact ones [B, ...]."""
    found, wanted = feature_values(decoded).flatten(1), exact.flatten(1)
    # Squares of what is very small or large would leave float32.
    unit = torch.maximum(found.abs(), wanted.abs()).amax(dim=1, keepdim=True).clamp(min=1e-30)
    return ((found - wanted) / unit).square().sum(dim=1) / (wanted / unit).square().sum(dim=1).clamp(min=1e-30)
