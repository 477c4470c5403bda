"""The recipe of stage one."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from logitcache.cache.format.manifest import TeacherName
from logitcache.config.recipe import NOWHERE, Component, Count
from logitcache.teacher.teacher import TeacherSource
from logitcache.views.datasets import Dataset
from logitcache.views.loader import StartMethod
from logitcache.views.mixing.mixing import MIXED_VIEWS_PER_IMAGE
from logitcache.views.spec import ViewSpec


class PrecomputeRecipe(Component):
    """Which images, views and teachers, and where to store the teachers' outputs.

    Only `dataset`, `views`, `teachers`, `shard_rows`, `row_checksums` and `record_parameters` determine what is stored;
    the other keys may change when a run is continued. Several teachers run on the same pixels in one pass.
    """

    stand_ins: ClassVar[dict[str, object]] = {"cache": NOWHERE}

    cache: str = Field(description="Cache to write, a folder or a URL.", examples=["caches/photos.zarr"])
    dataset: Dataset | None = Field(
        default=None,
        description="Images; may be omitted only if `lc.precompute` is given the data set itself.",
        examples=[{"kind": "image_folder", "root": "photos"}],
    )
    views: ViewSpec = Field(
        default=ViewSpec(), description="Views of every image: how many, and how they are augmented."
    )
    teachers: dict[TeacherName, TeacherSource] = Field(
        default={},
        description="Teachers, by names of your choice; may be omitted only if `lc.precompute` is given the modules.",
        examples=[{"resnet50": {"model": {"kind": "timm", "name": "resnet50.a1_in1k"}}}],
    )
    new_images: Literal["refuse", "append"] = Field(
        default="refuse",
        description="What to do with images of the data set that the cache does not have. `append` adds them in their "
        "order after those of the cache, and runs the teachers only on them; `refuse` is an error. Mixed views grow by "
        "whole windows of `pairing_window` images.",
    )
    batch_size: Count = Field(default=256, description="Images per forward pass.")
    num_workers: Annotated[int, Field(ge=0)] = Field(
        default=2, description="Rendering processes; 0 renders in the main process."
    )
    start_method: StartMethod = Field(default="forkserver", description="How Python starts the rendering processes.")
    shard_rows: Count | None = Field(
        default=None,
        description="Rows of a shard, the unit of work that an interruption can lose. By default about 32 MiB of the "
        "largest array and at most 65,536 rows, more from 8.4 million images on; for fewer than a million images at "
        "most a sixteenth of a view, but at least 64 rows or whole pages. Hot arrays fill whole pages of 4096 bytes: a "
        "target whose rows do not is stored packed, and the command reports it.",
        examples=[16384],
    )
    views_per_image: Count = Field(
        default=1,
        description="Views rendered from one decode of an image; as many shards are in progress at a time. It changes "
        "no byte of the cache.",
    )
    row_checksums: bool = Field(
        default=False,
        description="Whether to store a CRC-32 of every view's pixels, 4 bytes per row before compression, with which "
        "students compare every image that they render.",
    )
    record_parameters: bool = Field(
        default=False,
        description="Whether to store the parameters that the augmentations drew, for caches meant to outlive the code "
        "that draws them: `verify` compares them and `replay: recorded` uses them, with two views of them in the "
        "memory of every process.",
    )
    device: str = Field(
        default="auto",
        description="Device of the teachers: `auto` (the first of CUDA, MPS and CPU), `cpu`, `cuda`, `cuda:N` or "
        "`mps`.",
    )

    @model_validator(mode="after")
    def _options_agree(self) -> Self:
        if self.views_per_image > 1 and self.views.mixing and self.views.targets == "exact":
            raise ValueError(MIXED_VIEWS_PER_IMAGE)
        if self.views_per_image > self.views.num_views:
            raise ValueError(
                f"views_per_image is {self.views_per_image}, the views are {self.views.num_views}: take at most as many"
            )
        if self.views.targets == "linear" and any(source.features for source in self.teachers.values()):
            raise ValueError(
                "features of two images do not mix to those of their mixture. Leave out features, or targets: linear"
            )
        if self.row_checksums and self.views.targets == "linear":
            raise ValueError(
                "row_checksums are of the pixels that the teacher sees; with targets: linear a student sees others. "
                "Leave one of them out"
            )
        return self
