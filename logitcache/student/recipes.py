"""The recipes of stage two: a student on a cache, and a teacher on labels."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from logitcache.cache.reader import Replay
from logitcache.device import Precision
from logitcache.models import Model, Preprocessing
from logitcache.recipe import Component, Count, Float, Name, Positive
from logitcache.student.losses import CrossEntropy, KLDivergence, Loss
from logitcache.student.optimizers import AdamW, Optimizer, Schedule
from logitcache.views.augmentations import Augmentation
from logitcache.views.canaries import DriftLimits, Level
from logitcache.views.datasets import Dataset
from logitcache.views.loader import StartMethod
from logitcache.views.mixing import Mixings
from logitcache.views.spec import MIXED_VIEWS_PER_IMAGE, ViewSpec

Decay = Annotated[Float, Field(gt=0.0, lt=1.0)]


class Validation(Component):
    """Untouched images to measure on: a data set, or a cache of it whose teacher the student is compared with."""

    dataset: Dataset | None = None
    cache: str | None = None
    augmentations: tuple[Augmentation, ...] = ()
    every: Count = 1
    batch_size: Count = 512

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.dataset is None and self.cache is None:
            raise ValueError("name a data set (dataset) or a cache of one (cache)")
        if self.cache is not None and self.augmentations:
            raise ValueError("a cache brings its own augmentations: leave them out")
        return self


class LiveTeacher(Component):
    """A teacher of the cache, for --online, where the cache alone cannot say how to build it."""

    model: Model
    preprocessing: Preprocessing | None = None


class TrainingRecipe(Component):
    """What training on labels and training from a cache share.

    `batch_size` images make one optimiser step; `micro_batches` cuts them to fit in memory. An epoch is as many images
    as there are; with `views_per_image` k it is k views of every k-th image, so that one decode serves k views.
    `verify` says how exactly pixels rendered here must be those that a cache's teacher saw, `drift_limits` what counts
    as the drift of other kernels; `factories` are the functions of the user's own code that a cache's views may call.
    """

    out: str
    model: Model
    preprocessing: Preprocessing | None = None
    losses: Annotated[tuple[Loss, ...], Field(min_length=1)]
    epochs: Count
    batch_size: Count = 256
    micro_batches: Count = 1
    views_per_image: Count = 1
    drop_last: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    optimizer: Optimizer = AdamW()
    schedule: Schedule = Schedule()
    clip_norm: Positive | None = None
    ema: Decay | None = None
    precision: Precision = "float32"
    channels_last: bool = False
    compile: bool = False
    validation: Validation | None = None
    verify: Level = "strict"
    drift_limits: DriftLimits = DriftLimits()
    factories: tuple[str, ...] = ()
    checkpoint_steps: Count | None = None
    num_workers: Annotated[int, Field(ge=0)] = 2
    start_method: StartMethod = "forkserver"
    device: str = "auto"

    @model_validator(mode="after")
    def _parts_sum_to_the_whole(self) -> Self:
        coupled = [loss.kind for loss in self.losses if not loss.by_row]
        if coupled and self.micro_batches > 1:
            raise ValueError(f"{coupled} compare the rows of a whole batch with one another: leave out micro_batches")
        return self

    @model_validator(mode="after")
    def _every_image_equally_often(self) -> Self:
        if self.epochs % self.views_per_image:
            raise ValueError(
                f"{self.epochs} epochs with views_per_image {self.views_per_image} use some images more often than "
                f"others: make epochs a multiple of {self.views_per_image}"
            )
        return self


class StudentRecipe(TrainingRecipe):
    """A student that learns from a cache; `dataset` says where its images lie now, when they have moved.

    `num_views` takes only the first views of the cache; by default those that it has when the run begins. `replay` says
    whether the parameters of augmentations are drawn again or, where the cache has recorded them, read.
    """

    cache: str
    num_views: Count | None = None
    dataset: Dataset | None = None
    replay: Replay = "planned"
    losses: Annotated[tuple[Loss, ...], Field(min_length=1)] = (KLDivergence(),)
    teachers: dict[Name, LiveTeacher] = Field(default_factory=dict)


class TeacherRecipe(TrainingRecipe):
    """A model that learns from labels, on a fresh view of every image in each epoch."""

    dataset: Dataset
    augmentations: tuple[Augmentation, ...] = ()
    mixing: Mixings = ()
    losses: Annotated[tuple[CrossEntropy, ...], Field(min_length=1)] = (CrossEntropy(),)

    @model_validator(mode="after")
    def _views_are_possible(self) -> Self:
        if self.mixing and self.views_per_image > 1:
            raise ValueError(MIXED_VIEWS_PER_IMAGE)
        return self

    def views(self) -> ViewSpec:
        """Return the views of all epochs."""
        return ViewSpec(num_views=self.epochs, seed=self.seed, augmentations=self.augmentations, mixing=self.mixing)
