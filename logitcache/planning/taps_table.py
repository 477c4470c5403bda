"""The modules of teachers that features could tap."""

from typing import Any

import torch

from logitcache.planning.candidate_taps import Candidate, candidates
from logitcache.planning.draft import Draft
from logitcache.views.keys import ViewKey


def taps_of(draft: Draft) -> list[dict[str, Any]]:
    """Tell what every module could be kept as, in float16 and not compressed; None if its channels are not known."""
    pixels = draft.inputs.views.answered().__getitems__([ViewKey(0, 0)] * 2)
    rows = draft.todo.goal.num_images * draft.todo.goal.views.num_views
    return [
        _tap(teacher.name, candidate, rows)
        for teacher in draft.inputs.teachers
        for candidate in candidates(teacher, pixels)
    ]


def _tap(teacher: str, candidate: Candidate, rows: int) -> dict[str, Any]:
    numbers, pooled = torch.Size(candidate.shape).numel(), candidate.num_channels
    return {
        "teacher": teacher,
        "tap": candidate.tap,
        "module": candidate.module,
        "shape": list(candidate.shape),
        "pooled_row_bytes": None if pooled is None else 2 * pooled,
        "maps_row_bytes": 2 * numbers,
        "pooled_bytes": None if pooled is None else 2 * pooled * rows,
        "maps_bytes": 2 * numbers * rows,
    }
