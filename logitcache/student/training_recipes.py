"""The recipes of stage two: a student on a cache, and a teacher on labels."""

from collections.abc import Collection, Iterator
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from logitcache.cache.cache import Replay
from logitcache.cache.image_order import Without
from logitcache.config.recipe import NOWHERE, Component, Count, Name, Positive
from logitcache.config.trust import Trust
from logitcache.errors import RecipeError, raise_all
from logitcache.models import Model, Preprocessing
from logitcache.reductions import ChannelLayout
from logitcache.runtime.device import ChannelsLast, Precision
from logitcache.store.remote.client import is_remote
from logitcache.student.ensembles import Ensemble
from logitcache.student.evaluation.validation_recipe import Validation
from logitcache.student.exclusions import exclusions
from logitcache.student.live_teacher import LiveTeacher
from logitcache.student.losses import BinaryCrossEntropy, CrossEntropy, KLDivergence, Loss
from logitcache.student.optim.averaging import Average
from logitcache.student.optim.optimizers import AdamW, Fused, LearningRateSchedule, Optimizer
from logitcache.student.trackers import Trackers
from logitcache.views.augmentations import Augmentation
from logitcache.views.canaries import DriftLimits, Level
from logitcache.views.datasets import Dataset
from logitcache.views.loader import StartMethod
from logitcache.views.mixing.mixing import MIXED_VIEWS_PER_IMAGE, Mixings
from logitcache.views.sampling import MIXED_SAMPLING, EveryImage, Sampling
from logitcache.views.scaled_decoding import Decode
from logitcache.views.spec import ViewSpec

Seed = Annotated[int, Field(ge=0, lt=2**63)]
LabelLoss = Annotated[CrossEntropy | BinaryCrossEntropy, Field(discriminator="kind")]


class TrainingRecipe(Component):
    """What training on labels and training from a cache share."""

    needed: ClassVar[tuple[str, ...]] = ("model",)
    # So many epochs are a multiple of any views_per_image up to 10.
    stand_ins: ClassVar[dict[str, object]] = {"out": NOWHERE, "epochs": 2520}

    out: str = Field(description="Folder of the run, for weights, checkpoint and metrics.", examples=["runs/student"])
    model: Model | None = Field(
        default=None,
        description="Model to train; may be omitted only if `lc.train` is given the module itself.",
        examples=[{"kind": "torchvision", "name": "resnet18", "weights": None}],
    )
    preprocessing: Preprocessing | None = Field(
        default=None,
        description="Normalisation of the model's input; by default the model's own, or mean 0.5 and std 0.5.",
        examples=[{"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}],
    )
    losses: Annotated[tuple[Loss, ...], Field(min_length=1)]
    epochs: Count = Field(
        description="Epochs of the run. Epoch e replays view e modulo the number of views.", examples=[30]
    )
    batch_size: Count = Field(default=256, description="Images per optimiser step, over all processes together.")
    micro_batches: Count = Field(
        default=1,
        description="Number of parts into which a batch is split, to save memory by gradient accumulation. Losses that "
        "compare the images of a batch need 1.",
    )
    views_per_image: Count = Field(
        default=1,
        description="Number k of views rendered from one decode of an image. An epoch is then k views of every k-th "
        "image; `epochs` and `batch_size` must be multiples of k.",
    )
    sampling: Sampling = Field(default=EveryImage(), description="Images of an epoch, always as many as there are.")
    drop_last: bool = Field(
        default=False,
        description="Whether to skip a last batch that is not full. If it is too small for a loss that compares "
        "images, training is refused.",
    )
    seed: Seed = Field(default=0, description="Seed of the initial weights, the order of images and dropout.")
    order_seed: Seed | None = Field(
        default=None,
        description="Seed of the order of images; by default `seed`. In a sweep, equal orders share batches.",
        examples=[0],
    )
    optimizer: Optimizer = Field(default=AdamW(), description="Optimiser and its learning rate.")
    schedule: LearningRateSchedule = Field(default=LearningRateSchedule(), description="Learning rate over the run.")
    clip_norm: Positive | None = Field(
        default=None, description="Largest norm of the gradient; by default it is not clipped.", examples=[1.0]
    )
    keep: Literal["last", "best"] = Field(
        default="last",
        description="Weights to save at the end: those of the `last` epoch, or of the `best` one by top-1 (or mean "
        "average precision) on `validation`.",
    )
    ema: Average | None = Field(
        default=None,
        description="Exponential moving average of the weights, which is then evaluated and saved: its decay, or "
        "`{decay, warmup}`. By default none.",
        examples=[0.999],
    )
    precision: Precision = Field(
        default="float32", description="Precision of the forward pass, by autocast; `float16` uses a gradient scaler."
    )
    tap_layouts: dict[str, ChannelLayout] = Field(
        default={},
        description="Channel axis of the student's taps, by tap, like `layout` of features; by default it is "
        "determined automatically. Runs of versions before this key read every tap as `channels_first`.",
    )
    sync_batch_norm: bool = Field(
        default=False,
        description="Whether batch normalisation uses the whole batch of several processes "
        "(`torch.nn.SyncBatchNorm`); CUDA devices only, and not beside `grad_cam`.",
    )
    channels_last: ChannelsLast = "auto"
    fused: Fused = "auto"
    compile: bool = Field(default=False, description="Whether the model runs through `torch.compile`.")
    validation: Validation | None = Field(
        default=None,
        description="Images for validation after an epoch; by default there is no validation.",
        examples=[{"cache": "caches/fashion_mnist/test.zarr"}],
    )
    trackers: Trackers = ()
    verify: Level = Field(
        default="strict",
        description="How exactly rendered pixels must match those that the teacher saw. `strict` refuses any "
        "difference in the canaries and, if the cache has `row_checksums`, in any row; `numeric` compares only the "
        "canaries and accepts differences within `drift_limits`; `off` compares nothing.",
    )
    drift_limits: DriftLimits = Field(
        default=DriftLimits(), description="Differences of the canaries that `verify: numeric` accepts."
    )
    factories: tuple[str, ...] = Field(
        default=(),
        description="Functions of your own code, as `package.module:function`, that a cache's `custom` "
        "augmentations may call.",
        examples=[["mypackage.views:sharpen"]],
    )
    trust: Trust = Field(
        default=(),
        description="Digests of the manifests of caches that may name images at URLs, checkpoints and the like; the "
        "error and `logitcache inspect` print them. `--trust DIGEST` does the same.",
        examples=[["9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"]],
    )
    checkpoint_steps: Count | None = Field(
        default=None,
        description="Optimiser steps between two checkpoints within an epoch; by default one after each epoch.",
        examples=[500],
    )
    num_workers: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        default="auto",
        description="Rendering processes per rank; 0 renders in the main process. `auto`: none for a small data set, "
        "which stays on the device and is rendered there; otherwise 2.",
    )
    start_method: StartMethod = Field(default="forkserver", description="How Python starts the rendering processes.")
    device: str = Field(
        default="auto",
        description="Device of the model: `auto` (the first of CUDA, MPS and CPU), `cpu`, `cuda`, `cuda:N` or "
        "`mps`. Leave `auto` under torchrun: each process takes the GPU of its rank.",
    )

    @property
    def taps(self) -> list[str]:
        """The student's taps that the losses read."""
        return [tap for loss in self.losses for tap in loss.taps]

    @property
    def measured_taps(self) -> tuple[str, ...]:
        """The student's taps to compare with the teachers' features."""
        return () if self.validation is None else self.validation.taps

    def require_entries(self, given: Collection[str] = ()) -> None:
        """Raise RecipeError listing the missing entries for which no object is `given`."""
        missing = [key for key in self.needed if getattr(self, key) is None and key not in given]
        fix = "Fix: name one, or pass the object itself: lc.train(recipe, {}=…)"
        raise_all([RecipeError(f"key '{key}' is missing. {fix.format(key)}") for key in missing])

    def idle(self, epochs: float) -> str | None:
        """Return which entries have no effect."""
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
        yield from exclusions(self)


class StudentRecipe(TrainingRecipe):
    """A student that learns from a cache, on the images and views that the teacher saw."""

    stand_ins: ClassVar[dict[str, object]] = TrainingRecipe.stand_ins | {"cache": NOWHERE}

    cache: str = Field(description="Cache to learn from, a folder or a URL.", examples=["caches/photos.zarr"])
    num_views: Count | None = Field(
        default=None,
        description="Number of views to use, from the first on; by default all that the cache has when the run begins. "
        "A run resumed on a cache that has grown keeps the views that it began with.",
        examples=[8],
    )
    dataset: Dataset | None = Field(
        default=None,
        description="Location of the images if they moved since stage one, or came from your own code; they must be "
        "the same images. By default that of stage one.",
        examples=[{"kind": "image_folder", "root": "/data/photos"}],
    )
    without: Without = ()
    pairing: str | None = Field(
        default=None,
        description="Folder written by `logitcache pair`: the student learns from the paired images, and `dataset` is "
        "their location. By default it learns from the images that the teacher saw.",
        examples=["pairs/half"],
    )
    shuffled: bool = Field(
        default=False,
        description="Control run for a `pairing`: each image gets the targets of another image. Labels stay its own.",
    )
    teacher_dataset: Dataset | None = Field(
        default=None,
        description="Location of the teacher's images, for `--online` with a `pairing`, if they moved since stage one "
        "or came from your own code.",
        examples=[{"kind": "image_folder", "root": "/data/photos"}],
    )
    replay: Replay = Field(
        default="planned",
        description="Source of the augmentations' parameters: `planned` draws them again from the seed, `recorded` "
        "reads them from a cache with `record_parameters`.",
    )
    losses: Annotated[tuple[Loss, ...], Field(min_length=1)] = Field(
        default=(KLDivergence(),), description="Losses, whose sum is minimised."
    )
    teachers: dict[Name, LiveTeacher] = Field(
        default={}, description="Teachers of kind `custom` for `--online`, by their names in the cache."
    )
    ensembles: dict[Name, Ensemble] = Field(
        default={},
        description="Ensembles of the cache's teachers, by names of your choice, which losses use as `teacher`.",
        examples=[{"both": {"kind": "by_entropy", "teachers": ["a", "b"]}}],
    )

    def _without_effect(self) -> Iterator[str]:
        yield from super()._without_effect()
        if self.pairing is None:
            given = [key for key in ("shuffled", "teacher_dataset") if getattr(self, key)]
            yield from (f"has {key}, which is for a pairing. Fix: leave it out, or name `pairing`" for key in given)
        named = {loss.teacher for loss in self.losses if "teacher" in type(loss).model_fields}
        # A loss that names no teacher may mean an ensemble: it is refused for that, beside the cache's teachers.
        if None not in named and (unused := sorted(self.ensembles.keys() - named)):
            yield f"has ensembles {unused}, which no loss names. Fix: set a loss's `teacher` to one, or leave them out"


class TeacherRecipe(TrainingRecipe):
    """A model that learns from labels, with fresh augmentation of every image in each epoch."""

    needed: ClassVar[tuple[str, ...]] = ("model", "dataset")

    dataset: Dataset | None = Field(
        default=None,
        description="Labelled images to learn from; may be omitted only if `lc.train` is given the data set itself.",
        examples=[{"kind": "image_folder", "root": "photos"}],
    )
    augmentations: tuple[Augmentation, ...] = Field(
        default=(),
        description="Augmentations, applied in this order and drawn afresh in every epoch.",
        examples=[[{"kind": "random_resized_crop", "size": 224}, {"kind": "horizontal_flip"}]],
    )
    decode: Decode = "full"
    mixing: Mixings = ()
    losses: Annotated[tuple[LabelLoss, ...], Field(min_length=1)] = Field(
        default=(CrossEntropy(),), description="Losses on labels, whose sum is minimised."
    )

    def _impossible(self) -> Iterator[str]:
        yield from super()._impossible()
        if self.mixing and self.views_per_image > 1:
            yield MIXED_VIEWS_PER_IMAGE
        if self.mixing and self.sampling.by_class:
            yield MIXED_SAMPLING

    def views(self) -> ViewSpec:
        """Return the views of all epochs."""
        drawn = {"seed": self.seed, "augmentations": self.augmentations, "decode": self.decode, "mixing": self.mixing}
        return ViewSpec.model_validate(drawn | {"num_views": self.epochs})
