"""The recipe of stage one."""

from typing import Annotated

from pydantic import Field

from logitcache.recipe import Component, Count, Name
from logitcache.teacher.models import TeacherSource
from logitcache.views.datasets import Dataset
from logitcache.views.loader import StartMethod
from logitcache.views.spec import ViewSpec


class PrecomputeRecipe(Component):
    """Which images, which views of them, which teachers, and where their answers go.

    Only `dataset`, `views` and `teachers` decide what is stored; the rest says how fast. `shard_rows` is the unit of
    work that a stop can lose; by default about 32 MiB of the largest array.
    """

    cache: str
    dataset: Dataset | None = None
    views: ViewSpec = ViewSpec()
    teachers: Annotated[dict[Name, TeacherSource], Field(min_length=1)]
    batch_size: Count = 256
    num_workers: Annotated[int, Field(ge=0)] = 2
    start_method: StartMethod = "forkserver"
    shard_rows: Count | None = None
    device: str = "auto"
