"""The recipe of a derived cache: answers of finished caches, kept in another way or as one."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from logitcache.cache.encodings import Encoding
from logitcache.cache.format.derivation import MeanOf
from logitcache.cache.format.manifest import LOGITS, TeacherName
from logitcache.config.recipe import NOWHERE, Component, Count, Name, Positive


class DerivedTeacher(Component):
    """A teacher of the new cache, made from teachers of the source."""

    members: Annotated[dict[TeacherName, Positive], Field(min_length=1)] | None = Field(
        default=None,
        description="Teachers of the source and their weights in the average; by default the teacher of this name. "
        "Weights are normalised to a sum of 1.",
        examples=[{"resnet50": 1, "vit": 3}],
    )
    average: MeanOf | None = Field(
        default=None,
        description="What to average over several members: `logits`, or `probabilities` at `temperature`.",
        examples=["probabilities"],
    )
    temperature: Positive = Field(
        default=1.0, description="Temperature T at which `average: probabilities` is exact: the mean of softmax(z / T)."
    )
    logits: Encoding | None = Field(
        default=None,
        description="New encoding of the member's logits, or the encoding of the average; by default logits are not "
        "encoded again.",
        examples=[{"kind": "transform"}],
    )
    keep: tuple[Name, ...] | Literal["all"] = Field(
        default=(),
        description="Targets of the member to copy unchanged: names of features, and `logits` unless they are encoded "
        "again; `all` copies everything.",
        examples=[["pooled"]],
    )

    @model_validator(mode="after")
    def _options_agree(self) -> Self:
        several = self.members is not None and len(self.members) > 1
        if self.logits is None and not self.keep:
            raise ValueError("nothing is kept: give an encoding as `logits`, or name what is copied in `keep`")
        if several and (self.average is None or self.logits is None or self.keep):
            raise ValueError(
                "several members are made one: `average: probabilities` or `average: logits`, with `logits`, and no "
                "`keep`, as nobody has the features of a mean"
            )
        if self.average is not None and not several:
            raise ValueError("average: there is one member. Name at least two in `members`, or leave it out")
        if self.temperature != 1.0 and self.average != "probabilities":
            raise ValueError("temperature is of `average: probabilities`: leave it out")
        if self.logits is not None and LOGITS in self.keep:
            raise ValueError("logits are either encoded anew or kept: leave out `logits`, or logits in `keep`")
        return self


class DeriveRecipe(Component):
    """A finished cache, the targets to derive from it, and the new cache."""

    stand_ins: ClassVar[dict[str, object]] = {"cache": NOWHERE, "out": NOWHERE}

    cache: str = Field(description="Finished cache to read, a folder or a URL.", examples=["caches/imagenet.zarr"])
    out: str = Field(description="Cache to write, a folder or a URL.", examples=["caches/imagenet-small.zarr"])
    num_views: Count | None = Field(
        default=None, description="Number of views to take, from the first on; by default all.", examples=[4]
    )
    teachers: Annotated[dict[TeacherName, DerivedTeacher], Field(min_length=1)] = Field(
        description="Teachers of the new cache, by name.", examples=[{"resnet50": {"logits": {"kind": "transform"}}}]
    )
    shard_rows: Count | None = Field(
        default=None,
        description="Rows of a shard, as for precompute. If anything is copied, it must be that of the source, which "
        "is then the default.",
        examples=[16384],
    )
    device: str = Field(
        default="auto",
        description="Device of the encoding: `auto` (the first of CUDA, MPS and CPU), `cpu`, `cuda`, `cuda:N` or "
        "`mps`.",
    )
