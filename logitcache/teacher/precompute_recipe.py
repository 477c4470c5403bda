"""The recipe of stage one."""

from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from logitcache.cache.format.manifest import TeacherName
from logitcache.config.recipe import NOWHERE, Component, Count
from logitcache.teacher.teacher import TeacherSource
from logitcache.views.datasets import Dataset
from logitcache.views.loader import StartMethod
from logitcache.views.spec import MIXED_VIEWS_PER_IMAGE, ViewSpec


class PrecomputeRecipe(Component):
    """Which images, which views of them, which teachers, and where their answers go.

    Only `dataset`, `views`, `teachers` and what to record decide what is stored, the rest how fast. `shard_rows`
    is the unit of work that a stop can lose; by default about 32 MiB of the largest array. With `views_per_image` k,
    one decode serves k views: k shards are in work at a time. `row_checksums` keeps a checksum of every view's pixels,
    which students then compare; `record_parameters` keeps what the augmentations drew, for caches meant to outlive the
    code that draws it.
    """

    stand_ins: ClassVar[dict[str, object]] = {"cache": NOWHERE}

    cache: str
    dataset: Dataset | None = None
    views: ViewSpec = ViewSpec()
    teachers: dict[TeacherName, TeacherSource] = Field(default_factory=dict)
    batch_size: Count = 256
    num_workers: Annotated[int, Field(ge=0)] = 2
    start_method: StartMethod = "forkserver"
    shard_rows: Count | None = None
    views_per_image: Count = 1
    row_checksums: bool = False
    record_parameters: bool = False
    device: str = "auto"

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
