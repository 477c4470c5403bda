"""The files of an export: written whole or not at all, never over another unless asked to."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from logitcache.errors import RecipeError
from logitcache.shipping.metadata import Metadata
from logitcache.store.files import explained, write_atomically


def record_of(file: Path) -> Path:
    """Return the path of the record beside an exported file."""
    return file.with_name(f"{file.name}.json")


def new_file(path: str | Path, overwrite: bool) -> Path:
    """Return the path of a file to write, in a folder that exists. Raises RecipeError if the file is there."""
    file = Path(path).expanduser()
    if file.is_dir():
        raise RecipeError(f"'{file}' is a folder. Fix: name a file in it, {file / 'model.onnx'}")
    if file.exists() and not overwrite:
        raise RecipeError(f"'{file}' exists and is not overwritten. Fix: --overwrite, or another path")
    with explained(f"'{file.parent}'"):
        file.parent.mkdir(parents=True, exist_ok=True)
    return file


def write_with_record(file: Path, data: bytes, measured: Mapping[str, Any], metadata: Metadata) -> None:
    """Write a file, and beside it what was measured of it and its metadata, as JSON."""
    write_atomically(file, data)
    record = {"measured": measured, "metadata": metadata.model_dump(mode="json")}
    write_atomically(record_of(file), json.dumps(record, indent=2).encode() + b"\n")
