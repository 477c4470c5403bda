"""The recipe of a derived cache: answers of finished caches, kept in another way or as one."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from logitcache.cache.encodings import Encoding
from logitcache.cache.format.derivation import Average
from logitcache.cache.format.manifest import LOGITS, TeacherName
from logitcache.config.recipe import NOWHERE, Component, Count, Name, Positive


class DerivedTeacher(Component):
    """A teacher of the new cache, made of `members` of the source, by default of the one that has its name.

    `logits` encodes the member's logits anew, or the mean of several members by their weights. `keep` names what is
    copied as it is: features, and `logits` unless they are encoded anew; `all` copies all targets.
    `average: probabilities` is exact at `temperature`.
    """

    members: Annotated[dict[TeacherName, Positive], Field(min_length=1)] | None = None
    average: Average | None = None
    temperature: Positive = 1.0
    logits: Encoding | None = None
    keep: tuple[Name, ...] | Literal["all"] = ()

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
    """Which finished cache, what is made of it, and where that goes; `num_views` takes the first views only.

    `shard_rows` as in precompute; if something is copied, the shards are those of the source.
    """

    stand_ins: ClassVar[dict[str, object]] = {"cache": NOWHERE, "out": NOWHERE}

    cache: str
    out: str
    num_views: Count | None = None
    teachers: Annotated[dict[TeacherName, DerivedTeacher], Field(min_length=1)]
    shard_rows: Count | None = None
    device: str = "auto"
