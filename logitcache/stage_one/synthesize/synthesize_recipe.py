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
        description="Normalisation of the model's input; by default the model's own.",
        examples=[{"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}],
    )
    classes: Annotated[tuple[Output, ...], Field(min_length=1)] | None = Field(
        default=None,
        description="Outputs of the network for which images are synthesized, in the order of their labels; by default "
        "all.",
        examples=[[1, 25, 30]],
    )


class SynthesisLosses(Component):
    """Weights of the losses of DeepInversion (arXiv:1912.08795); a loss with weight 0 is omitted.

    Total variation and the L2 norm are computed on normalised pixels.
    """

    label: LossWeight = Field(
        default=1.0, description="Cross-entropy of the teacher's logits with the target label of the image."
    )
    batch_norm: LossWeight = Field(
        default=1.0,
        description="L2 distances between the mean and variance of every BatchNorm's input and its running statistics, "
        "summed over the layers.",
    )
    first_batch_norm: LossWeight = Field(
        default=10.0, description="Factor of the first BatchNorm, which is nearest to the pixels, in this sum."
    )
    total_variation_l1: LossWeight = Field(
        default=0.0, description="Mean absolute difference of neighbouring pixels, along axes and diagonals."
    )
    total_variation_l2: LossWeight = Field(
        default=0.0, description="L2 norm of an image's differences of neighbouring pixels, along axes and diagonals."
    )
    l2: LossWeight = Field(default=0.0, description="L2 norm of an image.")
    diversity: LossWeight = Field(
        default=0.0,
        description="Cosine similarity of the features of two images of a class: the last BatchNorm's input, averaged "
        "over positions and standardised. It makes images of a class differ.",
    )
    competition: LossWeight = Field(
        default=1.0,
        description="1 - the Jensen-Shannon divergence between the teacher's and the student's probabilities, which "
        "favours images on which they disagree. Used only with `--student`.",
    )

    @model_validator(mode="after")
    def _something_counts(self) -> Self:
        if not any(getattr(self, name) for name in type(self).model_fields if name not in _NO_LOSS_OF_THE_TEACHER):
            raise ValueError("no loss of the teacher counts: give `label` or `batch_norm` a weight")
        return self


class SynthesizeRecipe(Component):
    """A teacher, and the images to synthesize from it by optimisation.

    All keys except `num_batches` and `device` determine the pixels. Classes take turns, two images each, so that each
    batch has pairs of one class.
    """

    teacher: SynthesisTeacher | None = Field(
        default=None,
        description="The teacher; may be omitted only if `lc.synthesize` is given the module itself.",
        examples=[{"model": {"kind": "run", "path": "runs/teacher"}}],
    )
    size: Size | None = Field(
        default=None,
        description="Height and width of the images, one number for both; by default the model's `input_size`.",
        examples=[32],
    )
    channels: Literal[1, 3] = Field(default=3, description="Channels of the images: 3 for colour, 1 for grey.")
    num_batches: Count = Field(default=10, description="Batches of images; a larger number adds batches later.")
    batch_size: Annotated[int, Field(ge=2)] = Field(
        default=256,
        description="Images that are optimised together: their statistics are compared with those of BatchNorm.",
    )
    steps: Count = Field(default=500, description="Optimiser steps per batch (Adam with cosine decay).")
    lr: Positive = Field(default=0.1, description="Initial learning rate, in units of pixel / 255.")
    jitter: Annotated[int, Field(ge=0)] = Field(
        default=2,
        description="Largest random shift (roll) of all images of a batch in a step, in pixels along each axis.",
    )
    flip: bool = Field(default=True, description="Whether images are mirrored in a random half of the steps.")
    losses: SynthesisLosses = Field(default=SynthesisLosses(), description="Weights of the losses.")
    seed: Annotated[int, Field(ge=0, lt=2**64)] = Field(
        default=0, description="Seed of the first pixels, of the jitter and of the flips."
    )
    format: ImageForm = Field(
        default="image_folder",
        description="Format of the images: PNG files in class folders below `images`, or a tar archive of PNG and "
        "`.cls` files for each batch below `shards`.",
    )
    device: str = Field(
        default="auto",
        description="Device of the optimisation: `auto` (the first of CUDA, MPS and CPU), `cpu`, `cuda`, `cuda:N` or "
        "`mps`.",
    )

    @model_validator(mode="after")
    def _jitter_fits(self) -> Self:
        if self.size is not None and self.jitter >= min(pair(self.size)):
            raise ValueError(f"jitter {self.jitter} rolls images of {self.size} pixels around: less than a side")
        return self
