"""The recipe entry `validation`: the images to measure on, and what is measured."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from logitcache.config.recipe import Component, Count, Lenient
from logitcache.student.evaluation.multi_label import THRESHOLD
from logitcache.views.augmentations import Augmentation
from logitcache.views.datasets import Dataset


class ClassGroups(Component):
    """Classes by their number of training images: head, medium and tail (Liu et al. 2019)."""

    head: Annotated[int, Field(ge=0)] = Field(
        default=100, description="A class with more training images than this is a head class."
    )
    tail: Annotated[int, Field(ge=0)] = Field(
        default=20, description="A class with fewer training images than this is a tail class."
    )

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.tail > self.head + 1:
            raise ValueError(f"tail (< {self.tail}) and head (> {self.head}) have classes in common: raise head")
        return self


class Validation(Component):
    """Validation images: a data set, a cache with whose teacher the student is compared, or images of the student's own
    cache that are held out from training.
    """

    dataset: Dataset | None = Field(
        default=None,
        description="Validation images, if there is no `cache`, or their location if they moved.",
        examples=[{"kind": "image_folder", "root": "photos/val"}],
    )
    cache: str | None = Field(
        default=None,
        description="Cache of the validation images; it adds agreement with the teacher and KL divergence from it.",
        examples=["caches/fashion_mnist/test.zarr"],
    )
    pairing: str | None = Field(
        default=None,
        description="Folder written by `logitcache pair` for `cache`: the paired images are the validation images, and "
        "`dataset` is their location if they moved. Required with `cache` if the student has a `pairing`.",
        examples=["pairs/half-test"],
    )
    split: Annotated[float, Field(gt=0.0, lt=1.0), Lenient] | None = Field(
        default=None,
        description="Share of the student's cache to hold out from training and validate on, in view 0, with or "
        "without labels. Whether an image is held out depends on its index: all students of a cache hold out the same "
        "images.",
        examples=[0.1],
    )
    augmentations: tuple[Augmentation, ...] = Field(
        default=(),
        description="Augmentations of `dataset`, in this order, without randomness: a resize and a crop.",
        examples=[[{"kind": "resize", "size": 256}, {"kind": "center_crop", "size": 224}]],
    )
    class_map: Annotated[dict[str, Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = Field(
        default=None,
        description="Class of the model for each class of the images, by name or index, for `evaluate` on images with "
        "other classes. Images of classes that are not listed do not count, and their number is reported.",
        examples=[{"cat": 3, "7": 5}],
    )
    threshold: Annotated[float, Field(gt=0.0, lt=1.0), Lenient] = Field(
        default=THRESHOLD, description="Probability above which a class of multi-label data is predicted as present."
    )
    groups: ClassGroups = Field(default=ClassGroups(), description="Bounds of head and tail classes, for `evaluate`.")
    taps: tuple[str, ...] = Field(
        default=(),
        description="Modules of the student that `evaluate` compares with the features of `cache` by linear CKA, in "
        "addition to those that losses use.",
        examples=[["layer4"]],
    )
    every: Count = Field(
        default=1, description="Number of epochs between validations; the last epoch is always validated."
    )
    batch_size: Count = Field(default=512, description="Images per forward pass.")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.split is not None:
            if self.dataset is not None or self.cache is not None:
                raise ValueError("split measures on images of the student's cache: leave it out, or the other images")
        elif self.dataset is None and self.cache is None:
            raise ValueError("name a data set (dataset) or a cache of one (cache), or hold images out (split)")
        if self.augmentations and (self.cache is not None or self.split is not None):
            raise ValueError("a cache brings its own augmentations: leave them out")
        if self.pairing is not None and self.cache is None:
            raise ValueError("a pairing is of a cache: name it (cache), or leave out pairing")
        return self
