"""What stage one will take, before it begins: bytes, files, time and memory, from a probe of a few batches."""

import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from logitcache.cache.format.arrays import ArrayGroup, ArrayLayout
from logitcache.cache.format.manifest import LOGITS
from logitcache.cache.format.manifest_diff import is_more
from logitcache.errors import RecipeError
from logitcache.planning.costs import (
    StoreCost,
    break_even,
    fill_seconds,
    memory_of,
    requests_of_writing,
    skeleton_sizes,
    store_cost,
)
from logitcache.planning.draft import Draft, drafted
from logitcache.planning.probe import Probe, probe
from logitcache.planning.taps_table import taps_of
from logitcache.planning.upper_bounds import most_bytes, sketched
from logitcache.runtime.tables import as_text, format_bytes
from logitcache.stage_one.claims import Claims
from logitcache.store.remote.client import is_remote
from logitcache.teacher.precompute_recipe import PrecomputeRecipe

MARGIN = 1.05
"""Bytes are predicted to a twentieth: so much more has to be free."""


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
    """Tell what `precompute` with this recipe would take on this machine; writes nothing.

    `batches` are probed, by default as many as show it. `taps` lists what could be kept of each teacher as a feature.
    `workers` processes, each with a device, share the work: an estimate. Without `probing` teachers answer two images:
    bytes and files are told in seconds, those of packed arrays and fitted encodings as bounds. `teachers` and `dataset`
    give the objects themselves, as for `precompute`. Raises what that raises before its first shard.
    """
    if workers < 1 or (batches is not None and batches < 1):
        raise RecipeError(f"workers: {workers}, batches: {batches}. Fix: at least 1 of each")
    if batches is not None and not probing:
        raise RecipeError(f"batches: {batches} without a probe have no effect. Fix: leave out one of both")
    with (drafted if probing else sketched)(recipe, teachers=teachers, dataset=dataset) as draft:
        found = probe(draft, batches) if draft.todo.shards and probing else None
        listed = {"taps": taps_of(draft)} if taps else {}
    document = (_document(draft, found, workers) if probing else _bounds(draft)) | listed
    for warning in document["warnings"]:
        warnings.warn(warning, stacklevel=2)
    return document


def plan_text(document: Mapping[str, Any]) -> str:
    """Write a plan for human eyes: a table, then what it means."""
    figures = {key: value for key, value in document.items() if key not in ("warnings", "notes")}
    return as_text(figures) + "".join(f"\n{note}." for note in document["notes"]) + "\n"


def _document(draft: Draft, found: Probe | None, workers: int) -> dict[str, Any]:
    layout = draft.todo.layout
    there = {array.name: _bytes_there(draft, group, array) for group in layout.groups for array in group.arrays}
    document, whole = _stored(draft, {**there, **(found.packed if found else {})})
    document |= {
        "stop_loses": _lost(draft, found),
        "teacher_passes": draft.teacher_passes,
        **_time(draft, found, workers),
        **_memory(draft, found, whole),
        "requests": vars(requests_of_writing(whole, layout)) if is_remote(draft.inputs.recipe.cache) else None,
        "probe": _probed(draft, found),
        "arrays": _arrays(whole),
        "features": _features(draft, whole),
    }
    return document | {"warnings": _warnings(document), "notes": _notes(document, workers)}


def _bounds(draft: Draft) -> dict[str, Any]:
    """Describe a plan that was not probed: bytes and files alone."""
    arrays = draft.todo.layout.arrays
    document, whole = _stored(draft, {array.name: most_bytes(array) for array in arrays if array.storage == "packed"})
    bounds = [row | {"bound": "at most" if row["storage"] == "packed" else "exact"} for row in _arrays(whole)]
    document |= {"stop_loses": _lost(draft, None), "arrays": bounds, "features": _features(draft, whole)}
    notes = ["not probed: bytes of packed arrays, and bytes and files of encodings that are fitted, are at most these"]
    if draft.todo.recorded is not None:
        notes.append("the cache was not compared with images and teachers, nor its shards with their records")
    return document | {"warnings": _warnings(document), "notes": notes}


def _stored(draft: Draft, packed: Mapping[str, float]) -> tuple[dict[str, Any], StoreCost]:
    """Describe what a cache takes, given the bytes of a row of each packed array, and what of that is to do."""
    goal, layout = draft.todo.goal, draft.todo.layout
    skeleton, pending = skeleton_sizes(goal), draft.todo.shards
    new = {key: size for key, size in skeleton.items() if not draft.todo.store.exists(key)}
    whole, added = store_cost(layout, packed, skeleton), store_cost(layout, packed, new, draft.todo.missing)
    free = _free_bytes(draft.inputs.recipe.cache)
    return {
        "cache": draft.inputs.recipe.cache,
        "state": _state(draft),
        "device": str(draft.inputs.device),
        "images": goal.num_images,
        "views": goal.views.num_views,
        "shard_rows": goal.shard_rows,
        "shards": layout.num_shards,
        "shards_to_do": len(pending),
        "row_views_to_do": sum(shard.stop - shard.start for shard in pending),
        "bytes": whole.bytes,
        "new_bytes": added.bytes,
        "stored_bytes_per_row": round(whole.bytes_per_row, 1),
        "files": whole.files,
        "new_files": added.files,
        "free_bytes": free,
        "fits": None if free is None else added.bytes * MARGIN <= free,
    }, whole


def _lost(draft: Draft, found: Probe | None) -> dict[str, Any]:
    """Say what a stop drops at most: the shards in progress."""
    lost = Claims(draft.todo.snapshot, draft.todo.shards, draft.inputs.recipe.views_per_image).most_lost
    return {"row_views": lost, "seconds": None if found is None else lost * found.loop}


def _state(draft: Draft) -> str:
    """Say what stage one would do: begin, grow, resume, or nothing."""
    if draft.todo.recorded is None:
        return "new"
    if not draft.todo.shards:
        return "complete"
    return "growth" if is_more(draft.todo.goal, draft.todo.recorded) else "resume"


def _bytes_there(draft: Draft, group: ArrayGroup, array: ArrayLayout) -> float:
    """Return the stored bytes of a row of an array, without indices, by the shards that are there; 0 without any."""
    if draft.todo.recorded is None:
        return 0.0
    done = [shard for shard in draft.todo.layout.shards() if shard not in draft.todo.missing[group.name]]
    parts = (part for shard in done for part in draft.todo.snapshot.parts(group, shard) if part.array == array.name)
    total = sum(part.size - array.hot_bytes(0) for part in parts)
    rows = sum(array.rows_of(shard).stop - array.rows_of(shard).start for shard in done)
    return total / rows if rows else 0.0


def _time(draft: Draft, found: Probe | None, workers: int) -> dict[str, Any]:
    """Tell how long it takes, and from how many students on that pays."""
    before = draft.opening + draft.preparing
    time = {"opening_seconds": draft.opening, "preparing_seconds": draft.preparing}
    if found is None:
        return {"seconds": before, "time": time, "device_hours": None, "break_even_students": None}
    layout, pending = draft.todo.layout, draft.todo.shards
    filling = _filling(draft, found, sum(shard.stop - shard.start for shard in pending), len(pending), workers)
    rows = layout.num_images * layout.num_views
    whole = _filling(draft, found, rows, layout.num_shards, workers)
    seconds = before + found.start + filling
    rates = {
        "together": sum(shard.stop - shard.start for shard in pending) / filling,
        "render_in_one_process": 1 / found.render,
        "teachers": 1 / found.answer,
        "encode": 1 / max(found.keep, 1e-9),
        "compress_in_one_thread": 1 / max(found.write, 1e-9),
    }
    return {
        "seconds": seconds,
        "time": {**time, "starting_seconds": found.start, "filling_seconds": filling},
        "row_views_per_second": rates,
        "device_hours": workers * seconds / 3600,
        "break_even_students": break_even(workers * (before + found.start + whole), rows, found.answer),
    }


def _filling(draft: Draft, found: Probe, rows: int, shards: int, workers: int) -> float:
    cores = max(1, len(os.sched_getaffinity(0)) // workers)
    write = found.write + found.write_shard * shards / rows
    return fill_seconds(rows, shards, found.loop, write, found.cores, cores, workers)


def _memory(draft: Draft, found: Probe | None, whole: StoreCost) -> dict[str, Any]:
    """Tell what one process holds at its peak, besides what Python, torch, the teachers and the images' index take."""
    recipe, (channels, height, width) = draft.inputs.recipe, draft.todo.goal.image_shape
    memory = memory_of(
        draft.todo.layout,
        whole,
        channels * height * width,
        recipe.batch_size,
        recipe.num_workers,
        recipe.views_per_image,
    )
    return {
        "memory": {
            "filling_bytes": memory.filling,
            "waiting_bytes": memory.waiting,
            "rendered_bytes": memory.rendered,
            "total_bytes": memory.total,
            "device_bytes": found.device_bytes if found else None,
        }
    }


def _probed(draft: Draft, found: Probe | None) -> dict[str, Any]:
    return {
        "batches": found.batches if found else 0,
        "row_views": found.rows if found else 0,
        "calibration_row_views": draft.calibration_rows,
        "calibration_row_views_wanted": draft.calibration_wanted,
    }


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


def _features(draft: Draft, whole: StoreCost) -> list[dict[str, Any]]:
    """Tell what each feature takes, its errors and its records included."""
    taken = []
    for group in draft.todo.layout.targets:
        if group.target != LOGITS:
            entry = draft.todo.goal.teachers[group.teacher]
            total = sum(array.bytes for array in whole.arrays if array.group == group.name)
            taken.append(
                {
                    "feature": group.name,
                    "tap": entry.features[group.target].tap,
                    "shape": list(entry.stored_features[group.target].shape),
                    "bytes": total,
                    "stored_bytes_per_row": round(total / whole.rows, 2),
                    "share": round(total / whole.bytes, 3),
                }
            )
    return taken


def _free_bytes(cache: str) -> int | None:
    """Return what is free where the cache is, or is to be; None at a URL, which does not tell."""
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
    """Say what the figures mean and what they leave out."""
    probed, notes = document["probe"], []
    if document["break_even_students"] is not None:
        views = document["views"]
        notes.append(
            f"the cache costs less than the teacher in the loop from {document['break_even_students']} students on, "
            f"where each trains {views} epoch{'s' if views > 1 else ''} or more"
        )
    if probed["calibration_row_views"] < probed["calibration_row_views_wanted"]:
        notes.append(
            f"encodings are fitted to {probed['calibration_row_views']} row-views here, and to "
            f"{probed['calibration_row_views_wanted']} by precompute: their bytes may come out a little different"
        )
    if workers > 1:
        notes.append(f"{workers} workers are not measured: each is taken to be as fast as one, with its share of cores")
    if document["free_bytes"] is None:
        notes.append("how much room there is at a URL is not known")
    if probed["batches"]:
        notes.append("flushing files to the disk is not measured: it is hidden where the disk keeps up")
    return notes
