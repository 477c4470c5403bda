"""The recipe of `synthesize`: a teacher, the images to make, and the losses that they minimise."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from logitcache.cache.format.manifest import Output
from logitcache.config.recipe import Component, Count, Lenient, Positive
from logitcache.models import Model, Preprocessing
from logitcache.views.augmentations.base import Size, pair

LossWeight = Annotated[float, Field(ge=0.0), Lenient]
_NO_LOSS_OF_THE_TEACHER = ("first_batch_norm", "competition")
ImageForm = Literal["image_folder", "webdataset"]


class SynthesisTeacher(Component):
    """The teacher from which images are synthesized, a network with BatchNorm."""

    model: Model = Field(description="Model of the teacher.", examples=[{"kind": "run", "path": "runs/teacher"}])
    preprocessing: Preprocessing | None = Field(
        default=None,
        description="Normalisation of the model's input; by default what the model brings along.",
        examples=[{"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}],
    )
    classes: Annotated[tuple[Output, ...], Field(min_length=1)] | None = Field(
        default=None,
        description="Outputs of the network for whose classes images are made, in the order of their labels; by "
        "default all.",
        examples=[[1, 25, 30]],
    )


class SynthesisLosses(Component):
    """Weights of the losses of DeepInversion (arXiv:1912.08795); a loss of weight 0 is left out.

    Total variation and the norm are of the pixels as the teacher takes them, normalised.
    """

    label: LossWeight = Field(default=1.0, description="Cross-entropy of the teacher's logits to the image's label.")
    batch_norm: LossWeight = Field(
        default=1.0,
        description="L2 distances of mean and variance of every BatchNorm's input to its running statistics, summed "
        "over the layers.",
    )
    first_batch_norm: LossWeight = Field(
        default=10.0, description="Factor of the first BatchNorm in that sum: it is nearest to the pixels."
    )
    total_variation_l1: LossWeight = Field(
        default=0.0, description="Mean absolute difference of neighbouring pixels, along sides and diagonals."
    )
    total_variation_l2: LossWeight = Field(
        default=0.0, description="L2 norm of an image's differences of neighbouring pixels, along sides and diagonals."
    )
    l2: LossWeight = Field(default=0.0, description="L2 norm of an image.")
    diversity: LossWeight = Field(
        default=0.0,
        description="Cosine similarity of the features of two images of a class: the last BatchNorm's input, averaged "
        "over positions and standardised. It lets images of a class differ.",
    )
    competition: LossWeight = Field(
        default=1.0,
        description="1 - the Jensen-Shannon divergence of the teacher's and the student's probabilities: images on "
        "which they disagree. Counts with a student alone.",
    )

    @model_validator(mode="after")
    def _something_counts(self) -> Self:
        if not any(getattr(self, name) for name in type(self).model_fields if name not in _NO_LOSS_OF_THE_TEACHER):
            raise ValueError("no loss of the teacher counts: give `label` or `batch_norm` a weight")
        return self


class SynthesizeRecipe(Component):
    """A teacher, and the images that are optimised until it sees in them what it saw in training.

    All but `num_batches` and `device` decide the pixels. Every class gets two images in turn, so that each batch has
    pairs of a class.
    """

    teacher: SynthesisTeacher | None = Field(
        default=None,
        description="The teacher; may be left out only if `lc.synthesize` is given the module itself.",
        examples=[{"model": {"kind": "run", "path": "runs/teacher"}}],
    )
    size: Size | None = Field(
        default=None,
        description="Height and width of the images, one number for both; by default the model's `input_size`.",
        examples=[32],
    )
    channels: Literal[1, 3] = Field(default=3, description="Channels of the images: 3 for colour, 1 for grey.")
    num_batches: Count = Field(default=10, description="Batches of images; raised later, further batches are added.")
    batch_size: Annotated[int, Field(ge=2)] = Field(
        default=256, description="Images that are optimised together: their statistics are compared with BatchNorm's."
    )
    steps: Count = Field(default=500, description="Optimiser steps of a batch (Adam, cosine decay of the step size).")
    lr: Positive = Field(default=0.1, description="First step size, in units of pixel / 255.")
    jitter: Annotated[int, Field(ge=0)] = Field(
        default=2, description="Most pixels by which all images of a batch are rolled in a step, along each side."
    )
    flip: bool = Field(default=True, description="Whether every second step, at random, sees the images mirrored.")
    losses: SynthesisLosses = Field(default=SynthesisLosses(), description="Weights of the losses.")
    seed: Annotated[int, Field(ge=0, lt=2**64)] = Field(
        default=0, description="Seed of the first pixels, of the jitter and of the flips."
    )
    format: ImageForm = Field(
        default="image_folder",
        description="Form of the images: PNG files in class folders below `images`, or a tar archive of PNG and `.cls` "
        "for each batch below `shards`.",
    )
    device: str = Field(
        default="auto",
        description="Device that optimises: `auto` (the first of CUDA, MPS and CPU), `cpu`, `cuda`, `cuda:N` or `mps`.",
    )

    @model_validator(mode="after")
    def _jitter_fits(self) -> Self:
        if self.size is not None and self.jitter >= min(pair(self.size)):
            raise ValueError(f"jitter {self.jitter} rolls images of {self.size} pixels around: less than a side")
        return self
