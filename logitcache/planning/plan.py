"""Predict stage one before it begins: bytes, files, time and memory, from a probe of a few batches."""

import shutil
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from logitcache.cache.format.arrays import ArrayGroup, ArrayLayout
from logitcache.cache.format.manifest import LOGITS
from logitcache.cache.format.manifest_diff import is_more
from logitcache.errors import RecipeError
from logitcache.planning.candidate_taps import candidate_taps
from logitcache.planning.costs import (
    StoreCost,
    break_even,
    fill_seconds,
    memory_of,
    requests_of_writing,
    skeleton_sizes,
    store_cost,
)
from logitcache.planning.dry_run import DryRun, dry_run
from logitcache.planning.probe import Probe, probe
from logitcache.planning.timing import Quartiles
from logitcache.planning.upper_bounds import most_bytes, upper_bounds
from logitcache.runtime.device import num_cores
from logitcache.runtime.tables import format_bytes
from logitcache.stage_one.claims import Claims
from logitcache.stage_one.materialize.materialize import bytes_of
from logitcache.stage_one.materialize.view_files import PIXEL_FORMS
from logitcache.store.remote.client import is_remote
from logitcache.teacher.precompute_recipe import PrecomputeRecipe
from logitcache.views.keys import ViewKey

MARGIN = 1.05
"""Size estimates are within 5 %; require that headroom."""


def plan(
    recipe: PrecomputeRecipe,
    *,
    batches: int | None = None,
    taps: bool = False,
    workers: int = 1,
    probing: bool = True,
    teachers: Mapping[str, nn.Module] | None = None,
    dataset: object | None = None,
) -> dict[str, Any]:
    """Predict the cost of `precompute` with this recipe on this machine; writes nothing.

    `batches` limits the probe. `taps` lists the modules that features can tap. `workers` estimates that many processes,
    each with a device. Without `probing`, teachers run on only two images, and bytes and files are predicted in
    seconds, as upper bounds for packed arrays and fitted encodings. `teachers` and `dataset` take the objects
    themselves, as in `precompute`. Raises what `precompute` raises before its first shard.
    """
    if workers < 1 or (batches is not None and batches < 1):
        raise RecipeError(f"workers: {workers}, batches: {batches}. Fix: at least 1 of each")
    if batches is not None and not probing:
        raise RecipeError(f"batches: {batches} without a probe have no effect. Fix: leave out one of both")
    with (dry_run if probing else upper_bounds)(recipe, teachers=teachers, dataset=dataset) as run:
        found = probe(run, batches) if run.todo.shards and probing else None
        listed = {"taps": _taps(run)} if taps else {}
    document = (_document(run, found, workers) if probing else _bounds(run)) | listed
    for warning in document["warnings"]:
        warnings.warn(warning, stacklevel=2)
    return document


def _taps(run: DryRun) -> list[dict[str, Any]]:
    pixels = run.inputs.views.answered().__getitems__([ViewKey(0, 0)] * 2)
    return candidate_taps(run.inputs.teachers, pixels, run.todo.goal.num_images * run.todo.goal.views.num_views)


def _document(run: DryRun, found: Probe | None, workers: int) -> dict[str, Any]:
    recipe, layout, (channels, height, width) = run.inputs.recipe, run.todo.layout, run.todo.goal.image_shape
    packed = {array.name: _stored_bytes(run, group, array) for group in layout.groups for array in group.arrays}
    document, whole = _sizes(run, packed | dict(found.packed if found else {}))
    pixels = channels * height * width
    memory = memory_of(layout, whole, pixels, recipe.batch_size, recipe.num_workers, recipe.views_per_image)
    held = asdict(memory) | {"total": memory.total, "device": found.device_bytes if found else None}
    document |= {
        "stop_loses": _lost(run, found),
        "teacher_passes": run.teacher_passes,
        **_times(run, found, workers),
        "memory": {f"{name}_bytes": count for name, count in held.items()},
        "requests": vars(requests_of_writing(whole, layout)) if is_remote(recipe.cache) else None,
        "probe": {
            "batches": found.batches if found else 0,
            "row_views": found.rows if found else 0,
            "calibration_row_views": run.calibration_rows,
            "calibration_row_views_wanted": run.calibration_wanted,
        },
        "arrays": _arrays(whole),
        "features": _features(run, whole),
    }
    return document | {"warnings": _warnings(document), "notes": _notes(document, workers)}


def _bounds(run: DryRun) -> dict[str, Any]:
    """Describe a plan that was not probed: bytes and files alone."""
    arrays = run.todo.layout.arrays
    document, whole = _sizes(run, {array.name: most_bytes(array) for array in arrays if array.storage == "packed"})
    bounds = [row | {"bound": "at most" if row["storage"] == "packed" else "exact"} for row in _arrays(whole)]
    document |= {"stop_loses": _lost(run, None), "arrays": bounds, "features": _features(run, whole)}
    notes = ["not probed: bytes of packed arrays, and bytes and files of encodings that are fitted, are at most these"]
    if run.todo.recorded is not None:
        notes.append("the cache was not compared with images and teachers, nor its shards with their records")
    return document | {"warnings": _warnings(document), "notes": notes}


def _sizes(run: DryRun, packed: Mapping[str, float]) -> tuple[dict[str, Any], StoreCost]:
    """Return the sizes of a cache and of its missing shards, given the bytes of a row of each packed array."""
    todo, cache = run.todo, run.inputs.recipe.cache
    goal, layout, shards, skeleton = todo.goal, todo.layout, todo.shards, skeleton_sizes(todo.goal)
    new = {key: size for key, size in skeleton.items() if not todo.store.exists(key)}
    whole, added = store_cost(layout, packed, skeleton), store_cost(layout, packed, new, todo.missing)
    free = _free_bytes(cache)
    growth = todo.recorded is not None and is_more(goal, todo.recorded)
    return {
        "cache": cache,
        "state": "new" if todo.recorded is None else "complete" if not shards else "growth" if growth else "resume",
        "device": str(run.inputs.device),
        "images": goal.num_images,
        "views": goal.views.num_views,
        "shard_rows": goal.shard_rows,
        "shards": layout.num_shards,
        "shards_to_do": len(shards),
        "row_views_to_do": layout.num_new(shards),
        "bytes": whole.bytes,
        "new_bytes": added.bytes,
        "stored_bytes_per_row": round(whole.bytes_per_row, 1),
        "files": whole.files,
        "materialized": {f"{form}_bytes": bytes_of(run.inputs.views.answered(), pixels=form) for form in PIXEL_FORMS},
        "new_files": added.files,
        "free_bytes": free,
        "fits": None if free is None else added.bytes * MARGIN <= free,
    }, whole


def _lost(run: DryRun, found: Probe | None) -> dict[str, Any]:
    """Return the most work that a stop drops: the shards in progress."""
    lost = Claims(run.todo.snapshot, run.todo.shards, run.inputs.recipe.views_per_image).most_lost
    return {"row_views": lost, "seconds": None if found is None else lost * float(found.loop[1])}


def _stored_bytes(run: DryRun, group: ArrayGroup, array: ArrayLayout) -> float:
    """Return the stored bytes of a row of an array, without indices, in the committed shards; 0 without any."""
    if run.todo.recorded is None:
        return 0.0
    done = [shard for shard in run.todo.layout.shards() if shard not in run.todo.missing[group.name]]
    parts = (part for shard in done for part in run.todo.snapshot.stored(group, shard) if part.array == array.name)
    total = sum(part.size - array.hot_bytes(0) for part in parts)
    rows = sum(array.rows_of(shard).stop - array.rows_of(shard).start for shard in done)
    return total / rows if rows else 0.0


def _times(run: DryRun, found: Probe | None, workers: int) -> dict[str, Any]:
    """Return the seconds, as ranges between quartiles, and the number of students from which on they pay."""
    preparing = run.preparing + run.canaries_left_out * (run.pace if found is None else found.answer)
    before = run.opening + preparing
    time: dict[str, Any] = {"opening_seconds": run.opening, "preparing_seconds": _range(preparing)}
    if found is None:
        return {"seconds": _range(before), "time": time, "device_hours": None, "break_even_students": None}
    layout, shards = run.todo.layout, run.todo.shards
    todo, rows = layout.num_new(shards), layout.num_images * layout.num_views
    filling = _fill_seconds(found, todo, len(shards), workers)
    seconds, before = before + found.start + filling, before + found.start
    whole = workers * float((before + _fill_seconds(found, rows, layout.num_shards, workers))[1])
    return {
        "seconds": _range(seconds),
        "time": {**time, "starting_seconds": found.start, "filling_seconds": _range(filling)},
        "row_views_per_second": {
            "together": todo / float(filling[1]),
            "render_in_one_process": 1 / found.render,
            "teachers": 1 / found.answer,
            "encode": 1 / max(found.keep, 1e-9),
            "compress_in_one_thread": 1 / max(found.write, 1e-9),
        },
        "device_hours": workers * float(seconds[1]) / 3600,
        "break_even_students": break_even(whole, rows, found.answer) if run.teacher_passes else None,
    }


def _range(seconds: Quartiles) -> list[float]:
    return [float(seconds[0]), float(seconds[2])]


def _fill_seconds(found: Probe, rows: int, shards: int, workers: int) -> Quartiles:
    cores = max(1, num_cores() // workers)
    write = found.write + found.write_shard * shards / rows
    return np.array([fill_seconds(rows, shards, loop, write, found.cores, cores, workers) for loop in found.loop])


def _arrays(whole: StoreCost) -> list[dict[str, Any]]:
    return [
        {
            "array": array.name,
            "storage": array.storage,
            "row_bytes": array.row_bytes,
            "stored_bytes_per_row": round(array.bytes / whole.rows, 2),
            "files": array.files,
            "bytes": array.bytes,
            "share": round(array.bytes / whole.bytes, 3),
        }
        for array in whole.arrays
    ]


def _features(run: DryRun, whole: StoreCost) -> list[dict[str, Any]]:
    """Return a row for each feature, its errors included."""
    rows = []
    for group in (group for group in run.todo.layout.targets if group.target != LOGITS):
        entry = run.todo.goal.teachers[group.teacher]
        total = sum(array.bytes for array in whole.arrays if array.group == group.name)
        rows.append(
            {
                "feature": group.name,
                "tap": entry.features[group.target].tap,
                "shape": list(entry.stored_features[group.target].shape),
                "bytes": total,
                "stored_bytes_per_row": round(total / whole.rows, 2),
                "share": round(total / whole.bytes, 3),
            }
        )
    return rows


def _free_bytes(cache: str) -> int | None:
    """Return the free bytes of the disk that holds the cache, or will; None at a URL, where it is not known."""
    if is_remote(cache):
        return None
    path = Path(cache).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _warnings(document: Mapping[str, Any]) -> list[str]:
    if document["fits"] is not False:
        return []
    needed, free = format_bytes(document["new_bytes"]), format_bytes(document["free_bytes"])
    return [
        f"{document['cache']} takes {needed} more, and its disk has {free} free: it would fill. Fix: free space, "
        "another `cache:` path, fewer views, or an encoding and features that take less"
    ]


def _notes(document: Mapping[str, Any], workers: int) -> list[str]:
    """Explain the figures and list what is not measured."""
    probed, views, students = document["probe"], document["views"], document["break_even_students"]
    used, wanted = probed["calibration_row_views"], probed["calibration_row_views_wanted"]
    notes = {
        f"the cache costs less than the teacher in the loop from {students} students on, "
        f"if each trains {views} epoch{'s' if views > 1 else ''} or more": students is not None,
        f"encodings are fitted to {used} row-views here, and to {wanted} by precompute: their bytes may come out a "
        "little different": used < wanted,
        f"{workers} workers are not measured: each is taken to be as fast as one, with its share of cores": workers > 1,
        "the free space at a URL is not known": document["free_bytes"] is None,
        "writing to the disk is not timed: it costs nothing if the disk keeps up": probed["batches"] > 0,
    }
    return [note for note, applies in notes.items() if applies]
