"""What is recorded of an exported file, in it and beside it.

In it: enough to prepare images, name the classes and know the run. Beside it: what was measured, too. Files are written
whole or not at all, never over another unless asked to.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, JsonValue, model_validator

from logitcache.config.recipe import Component, Count
from logitcache.errors import RecipeError
from logitcache.models import Preprocessing
from logitcache.models.base import Side
from logitcache.store.files import explained, write_atomically
from logitcache.student.runs.trained import Evaluation
from logitcache.views.datasets.images.image_files import Orientation

KEY = "logitcache"
"""The entry of an ONNX file's `metadata_props`, and of a .pt2 file's extra files, that holds it."""

MOST_COUNT = 1 << 20
"""Classes or channels of a file that is read."""

PixelType = Literal["uint8", "float"]
Arithmetic = Literal["float32", "int8"]


class Provenance(Component):
    """The run that a file was made from: the entry of its model (None for a module passed to train), its digests.

    `weights` is the sha256 of the exported parameters, `learns_from` the identity of the data, `versions` those of the
    export. `num_parameters` and `flops` for an image are the network's, before the export; None in files of earlier
    releases.
    """

    model: JsonValue
    weights: str
    learns_from: dict[str, JsonValue]
    versions: dict[str, str]
    num_parameters: Count | None = None
    flops: Count | None = None


class Metadata(Component):
    """The entry `logitcache` of an exported file.

    The graph takes `shape` [C, h, w] for each image: `uint8` pixels, or `float` ones of 0 to 1; it normalises them by
    `preprocessing`. `evaluation` has the transform before it and the names of the classes.
    """

    format: Literal[1] = 1
    pixels: PixelType
    shape: tuple[Annotated[Count, Field(le=MOST_COUNT)], Side, Side]
    num_classes: Annotated[Count, Field(le=MOST_COUNT)]
    multi_label: bool
    arithmetic: Arithmetic
    orientation: Orientation
    preprocessing: Preprocessing
    evaluation: Evaluation
    run: Provenance

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(self.preprocessing.mean) != self.shape[0]:
            raise ValueError(f"{len(self.preprocessing.mean)} means for {self.shape[0]} channels")
        names = self.evaluation.class_names
        if names is not None and len(names) != self.num_classes:
            raise ValueError(f"{len(names)} names for {self.num_classes} classes")
        return self


def record_of(file: Path) -> Path:
    """Return the path of the record beside an exported file."""
    return file.with_name(f"{file.name}.json")


def new_file(path: str | Path, overwrite: bool, suffix: str = ".onnx") -> Path:
    """Return the path of a file to write, in a folder that exists. Raises RecipeError if the file is there.

    Commands tell files from runs by the suffix.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        raise RecipeError(f"'{file}' is a folder. Fix: name a file in it, {file / 'model.onnx'}")
    if file.suffix != suffix:
        raise RecipeError(f"'{file}' does not end in {suffix}, by which it is known. Fix: {file}{suffix}")
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
