"""A plan for people: what it comes to in a few lines, and every figure on demand."""

from collections.abc import Mapping
from typing import Any

from logitcache.runtime.console import duration
from logitcache.runtime.tables import as_text, format_bytes


def plan_text(document: Mapping[str, Any], *, every_figure: bool = False) -> str:
    """Format a plan as a few lines and its notes; then the taps that were asked for, or every figure as tables."""
    notes = "".join(f"\n{note[0].upper()}{note[1:]}." for note in document["notes"])
    figures = {key: value for key, value in document.items() if key not in ("warnings", "notes")}
    shown = figures if every_figure else {key: figures[key] for key in ("taps",) if key in figures}
    tables = f"\n{as_text(shown).lstrip()}" if shown else ""
    return f"{as_text(_short(document))}{notes}\n{tables}"


def _short(document: Mapping[str, Any]) -> dict[str, str]:
    """Return what a plan comes to, by subject."""
    lines = {"work": _work(document)}
    if document["shards_to_do"] and "seconds" in document:
        lost = document["stop_loses"]["seconds"]
        lines["time"] = f"{_range(document['seconds'])}; a stop loses {duration(lost)} of it at most"
        rate = document["row_views_per_second"]["teachers"]
        lines["teachers"] = f"{document['teacher_passes']:,} passes of an image through a network, {rate:.3g} a second"
    lines["cache"] = _cache(document)
    if memory := document.get("memory"):
        lines["memory"] = f"{format_bytes(memory['total_bytes'])}, besides Python and the teachers"
    return lines


def _work(document: Mapping[str, Any]) -> str:
    images, views, state = document["images"], document["views"], document["state"]
    work = f"{images:,} images × {views} view{'s' * (views > 1)} on {document['device']}"
    if state == "complete":
        return f"{work}: all of it is done"
    return work if state == "new" else f"{work}, of which {document['row_views_to_do']:,} answers are to do"


def _cache(document: Mapping[str, Any]) -> str:
    line = f"{document['cache']}: {format_bytes(document['bytes'])} in {document['files']:,} files"
    if document["new_bytes"] != document["bytes"]:
        line += f", of which {format_bytes(document['new_bytes'])} are new"
    free = document["free_bytes"]
    return line if free is None else f"{line}; {format_bytes(free)} are free"


def _range(seconds: tuple[float, float]) -> str:
    """Format the quartiles of an estimate."""
    return " to ".join(dict.fromkeys(duration(one) for one in seconds))
