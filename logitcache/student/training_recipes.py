"""The recipes of stage two: a student on a cache, and a teacher on labels."""

from collections.abc import Collection, Iterator
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from logitcache.cache.cache import Replay
from logitcache.config.recipe import NOWHERE, Component, Count, Float, Name, Positive
from logitcache.config.trust import Trust
from logitcache.errors import RecipeError, raise_all
from logitcache.models import Model, Preprocessing
from logitcache.reductions import Layout
from logitcache.runtime.device import Precision
from logitcache.store.remote.client import is_remote
from logitcache.student.ensembles import Ensemble
from logitcache.student.evaluation.multi_label import THRESHOLD
from logitcache.student.losses import BinaryCrossEntropy, CrossEntropy, KLDivergence, Loss
from logitcache.student.optim.averaging import Average
from logitcache.student.optim.optimizers import AdamW, LearningRateSchedule, Optimizer
from logitcache.views.augmentations import Augmentation
from logitcache.views.canaries import DriftLimits, Level
from logitcache.views.datasets import Dataset
from logitcache.views.loader import StartMethod
from logitcache.views.mixing import Mixings
from logitcache.views.sampling import MIXED_SAMPLING, EveryImage, Sampling
from logitcache.views.spec import MIXED_VIEWS_PER_IMAGE, ViewSpec

LabelLoss = Annotated[CrossEntropy | BinaryCrossEntropy, Field(discriminator="kind")]


class ClassGroups(Component):
    """Classes by their number of training images: head, more than so many, tail, fewer than so many, and medium."""

    head: Annotated[int, Field(ge=0)] = 100
    tail: Annotated[int, Field(ge=0)] = 20

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.tail > self.head + 1:
            raise ValueError(f"tail (< {self.tail}) and head (> {self.head}) have classes in common: raise head")
        return self


class Validation(Component):
    """Untouched images to measure on: a data set, or a cache of it whose teacher the student is compared with.

    `class_map` maps classes of the images, by name or index, to those of the model, if they differ. Of images of any
    number of classes, answers are yes if their probability is above `threshold`. `groups` and `taps`, modules to
    compare with the teachers' features, are for `evaluate` alone.
    """

    dataset: Dataset | None = None
    cache: str | None = None
    augmentations: tuple[Augmentation, ...] = ()
    class_map: Annotated[dict[str, Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None
    threshold: Annotated[Float, Field(gt=0.0, lt=1.0)] = THRESHOLD
    groups: ClassGroups = ClassGroups()
    taps: tuple[str, ...] = ()
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
    """A teacher of the cache, for --online, if the cache does not record how to build it."""

    model: Model
    preprocessing: Preprocessing | None = None


class TrainingRecipe(Component):
    """What training on labels and training from a cache share.

    `model` may be left out if the module itself is passed.
    `batch_size` images make one optimiser step; `micro_batches` cuts them to fit in memory. An epoch is as many images
    as there are; with `views_per_image` k it is k views of every k-th image, so that one decode serves k views.
    `keep`: the run ends with the weights of the last epoch, or of the one that measured best.
    `sampling` may draw images by class instead, as many. `sync_batch_norm` normalises by the whole batch if several
    processes share it, each on a CUDA device.
    `tap_layouts`: by tap, where a module of the student puts its channels; by default that is decided.
    `verify`: how exactly pixels rendered here must be those that a cache's teacher saw, `drift_limits`: what counts
    as the drift of other kernels; `factories` are the functions of the user's own code that a cache's views may call,
    `trust` the digests of caches that may name data sets and teachers beyond the allow-list.
    """

    needed: ClassVar[tuple[str, ...]] = ("model",)
    # So many epochs are a multiple of any views_per_image up to 10.
    stand_ins: ClassVar[dict[str, object]] = {"out": NOWHERE, "epochs": 2520}

    out: str
    model: Model | None = None
    preprocessing: Preprocessing | None = None
    losses: Annotated[tuple[Loss, ...], Field(min_length=1)]
    epochs: Count
    batch_size: Count = 256
    micro_batches: Count = 1
    views_per_image: Count = 1
    sampling: Sampling = EveryImage()
    drop_last: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    optimizer: Optimizer = AdamW()
    schedule: LearningRateSchedule = LearningRateSchedule()
    clip_norm: Positive | None = None
    keep: Literal["last", "best"] = "last"
    ema: Average | None = None
    precision: Precision = "float32"
    tap_layouts: dict[str, Layout] = Field(default_factory=dict)
    sync_batch_norm: bool = False
    channels_last: bool = False
    compile: bool = False
    validation: Validation | None = None
    verify: Level = "strict"
    drift_limits: DriftLimits = DriftLimits()
    factories: tuple[str, ...] = ()
    trust: Trust = ()
    checkpoint_steps: Count | None = None
    num_workers: Annotated[int, Field(ge=0)] = 2
    start_method: StartMethod = "forkserver"
    device: str = "auto"

    @property
    def taps(self) -> list[str]:
        """The student's taps that the losses read."""
        return [tap for loss in self.losses for tap in loss.taps]

    @property
    def measured_taps(self) -> tuple[str, ...]:
        """The student's taps to compare with the teachers' features."""
        return () if self.validation is None else self.validation.taps

    def require_entries(self, given: Collection[str] = ()) -> None:
        """Raise RecipeError listing the entries that are missing, and in whose place no object is `given`."""
        missing = [key for key in self.needed if getattr(self, key) is None and key not in given]
        fix = "Fix: name one, or pass the object itself: lc.train(recipe, {}=…)"
        raise_all([RecipeError(f"key '{key}' is missing. {fix.format(key)}") for key in missing])

    def idle(self, epochs: float) -> str | None:
        """Return why parts of a batch are fewer than asked for, and which entries no loss looks at."""
        return ". It ".join(self._without_effect()) or None

    def _without_effect(self) -> Iterator[str]:
        if self.micro_batches > self.batch_size:
            yield f"has micro_batches {self.micro_batches} of {self.batch_size} images. Fix: at most {self.batch_size}"
        taps = {*self.taps, *self.measured_taps}
        if unused := sorted(self.tap_layouts.keys() - taps):
            yield f"has tap_layouts of {unused}, the taps are {sorted(taps)}. Fix: leave them out, or tap them"

    @field_validator("out")
    @classmethod
    def _is_here(cls, out: str) -> str:
        if is_remote(out):
            raise ValueError(f"{out} is a URL; a run is kept in a folder of this machine. Name one")
        return out

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        for reason in self._impossible():
            raise ValueError(reason)
        return self

    def _impossible(self) -> Iterator[str]:
        """Yield why entries exclude one another."""
        if self.keep == "best" and self.validation is None:
            yield "keep: best keeps the weights that measure best, and nothing is measured: add validation"
        coupled = [loss.kind for loss in self.losses if not loss.by_row]
        if coupled and self.micro_batches > 1:
            yield f"{coupled} compare the rows of a whole batch with one another: leave out micro_batches"
        if few := [loss.kind for loss in self.losses if self.batch_size < loss.min_rows]:
            largest = max(loss.min_rows for loss in self.losses)
            yield f"{few} compare the rows of a batch with one another: make batch_size {largest} or more"
        within = [loss.kind for loss in self.losses if loss.differentiates]
        if within and self.compile:
            yield f"{within} take gradients inside the model, which a compiled one hides: leave out compile"
        if within and self.sync_batch_norm:
            yield (
                f"{within} take gradients inside the model, and torch.nn.SyncBatchNorm has none of these: leave out "
                "sync_batch_norm"
            )
        if self.epochs % self.views_per_image:
            yield (
                f"{self.epochs} epochs with views_per_image {self.views_per_image} use some images more often than "
                f"others: make epochs a multiple of {self.views_per_image}"
            )


class StudentRecipe(TrainingRecipe):
    """A student that learns from a cache; `dataset` names its images if they have moved.

    `num_views` takes only the first views of the cache; by default those that it has when the run begins. `replay`:
    the parameters of augmentations are drawn again or, if the cache has recorded them, read. `ensembles` are
    teachers made of the cache's, for losses to name.
    """

    stand_ins: ClassVar[dict[str, object]] = TrainingRecipe.stand_ins | {"cache": NOWHERE}

    cache: str
    num_views: Count | None = None
    dataset: Dataset | None = None
    replay: Replay = "planned"
    losses: Annotated[tuple[Loss, ...], Field(min_length=1)] = (KLDivergence(),)
    teachers: dict[Name, LiveTeacher] = Field(default_factory=dict)
    ensembles: dict[Name, Ensemble] = Field(default_factory=dict)

    def _without_effect(self) -> Iterator[str]:
        yield from super()._without_effect()
        named = {loss.teacher for loss in self.losses if "teacher" in type(loss).model_fields}
        # A loss that names no teacher may mean an ensemble: it is refused for that, beside the cache's teachers.
        if None not in named and (unused := sorted(self.ensembles.keys() - named)):
            yield f"has ensembles {unused}, which no loss names. Fix: set a loss's `teacher` to one, or leave them out"


class TeacherRecipe(TrainingRecipe):
    """A model that learns from labels, on a fresh view of every image in each epoch."""

    needed: ClassVar[tuple[str, ...]] = ("model", "dataset")

    dataset: Dataset | None = None
    augmentations: tuple[Augmentation, ...] = ()
    mixing: Mixings = ()
    losses: Annotated[tuple[LabelLoss, ...], Field(min_length=1)] = (CrossEntropy(),)

    def _impossible(self) -> Iterator[str]:
        yield from super()._impossible()
        if self.mixing and self.views_per_image > 1:
            yield MIXED_VIEWS_PER_IMAGE
        if self.mixing and self.sampling.by_class:
            yield MIXED_SAMPLING

    def views(self) -> ViewSpec:
        """Return the views of all epochs."""
        return ViewSpec(num_views=self.epochs, seed=self.seed, augmentations=self.augmentations, mixing=self.mixing)
