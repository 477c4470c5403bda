"""What an exported file records of itself: enough to prepare images, name the classes and know the run."""

from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, model_validator

from logitcache.config.recipe import Component, Count
from logitcache.models import Preprocessing
from logitcache.models.base import Side
from logitcache.student.runs.trained import Evaluation
from logitcache.views.datasets.images.image_files import Orientation

KEY = "logitcache"
"""The entry of an ONNX file's `metadata_props`, and of a .pt2 file's extra files, that holds it."""

MOST_COUNT = 1 << 20
"""Classes or channels of a file that is read."""

Pixels = Literal["uint8", "float"]
Arithmetic = Literal["float32", "int8"]


class Provenance(Component):
    """The run that a file was made from: the entry of its model (None for a module passed to train), its digests.

    `weights` is the sha256 of the exported parameters, `learns_from` the identity of the data, `versions` those of the
    export.
    """

    model: JsonValue
    weights: str
    learns_from: dict[str, JsonValue]
    versions: dict[str, str]


class Metadata(Component):
    """The entry `logitcache` of an exported file.

    The graph takes `shape` [C, h, w] for each image: `uint8` pixels, or `float` ones of 0 to 1; it normalises them by
    `preprocessing`. `evaluation` has the transform before it and the names of the classes.
    """

    format: Literal[1] = 1
    pixels: Pixels
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
