"""The source of a derived cache: a finished cache, restricted to the targets that the new teachers need."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from logitcache.cache.format.manifest import LOGITS, Manifest, TeacherEntry
from logitcache.cache.format.metadata import read_tables
from logitcache.cache.read.shard_reader import ShardReader
from logitcache.cache.snapshot import Snapshot
from logitcache.errors import MismatchError, RecipeError, caught, raise_all
from logitcache.logits import EnsembleLogits, at_least_float32, dense_logits
from logitcache.models import Classifier
from logitcache.runtime.console import track
from logitcache.stage_one.derive.derive_recipe import DerivedTeacher, DeriveRecipe
from logitcache.store.shards import Shard
from logitcache.targets import Targets
from logitcache.teacher.calibration import calibration_keys, num_calibration_rows

Tables = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class MemberOrigin:
    """A teacher of the new cache: the mean of source teachers (members), with `weights` that add up to 1."""

    teacher: DerivedTeacher
    weights: Mapping[str, float]
    kept: tuple[str, ...]

    def logits(self, answers: Mapping[str, Targets]) -> Tensor:
        """Average the logits of all members, float32 [B, C]."""
        members = [at_least_float32(dense_logits(answers[name])) for name in self.weights]
        if self.teacher.average != "probabilities":
            return sum((w * z for w, z in zip(self.weights.values(), members, strict=True)), torch.zeros(()))
        weights = members[0].new_tensor([list(self.weights.values())]).expand(len(members[0]), -1)
        temperature = self.teacher.temperature
        mean = EnsembleLogits(tuple(members), weights, members[0].shape[1])
        return mean.log_probs(temperature) * temperature


@dataclass(frozen=True)
class CachedSample:
    """Calibration rows for an encoding: cached answers to the views that stage one would draw."""

    reader: ShardReader
    name: str
    origin: MemberOrigin

    @property
    def classifier(self) -> Classifier:
        """Raise RecipeError: a cache has no network."""
        raise RecipeError(
            f"teachers.{self.name}.logits: kind: head takes the weights of the teacher's last layer, which are not in "
            "a cache. Fix: if the source keeps a head, `keep: [logits]`; else another kind"
        )

    @property
    def logits(self) -> Tensor:
        """Logits, float32 [N, C] on the CPU."""
        return torch.cat(list(self._answers()))

    @property
    def images(self) -> Tensor:
        """Image index of each row, int64 [N]."""
        return torch.tensor([index for shard in self._rows for index in self._rows[shard]])

    @property
    def examples(self) -> Targets:
        """Raise RecipeError, as `classifier` does: only the encoding `head` needs them."""
        raise RecipeError(f"teachers.{self.name}: a cache keeps no network to try")

    @property
    def num_rows(self) -> int:
        """Number of rows of the whole cache."""
        return self.reader.snapshot.manifest.num_images * self.reader.snapshot.manifest.views.num_views

    @property
    def wanted_rows(self) -> int:
        """Number of rows to draw, if the cache has as many."""
        member = next(iter(self.origin.weights))
        return num_calibration_rows(self.reader.snapshot.manifest.teachers[member].num_classes or 0)

    @cached_property
    def _rows(self) -> dict[Shard, list[int]]:
        """Row indices by shard."""
        manifest, layout = self.reader.snapshot.manifest, self.reader.layout
        spec, found = manifest.views, dict[Shard, list[int]]()
        for view, index in calibration_keys(spec.seed, manifest.num_images, spec.num_views, self.wanted_rows):
            found.setdefault(layout.shard(view, index // layout.shard_rows), []).append(index)
        return found

    def _answers(self) -> Iterator[Tensor]:
        for shard in track(self._rows, f"calibrate {self.name}", len(self._rows), "shards"):
            rows, chosen = self.reader.rows(shard), np.array(self._rows[shard]) - shard.start
            yield self.origin.logits(self.reader.targets(shard, rows, chosen))


@dataclass(frozen=True)
class SourceCache:
    """A finished cache, restricted to the targets that are needed, and the members of each new teacher."""

    snapshot: Snapshot
    origins: Mapping[str, MemberOrigin]

    @classmethod
    def of(cls, recipe: DeriveRecipe, cache: Snapshot) -> "SourceCache":
        """Restrict a cache to the targets of a recipe. Raises RecipeError or MismatchError if one is missing."""
        where, manifest = str(cache.store), cache.manifest
        views = recipe.num_views or manifest.views.num_views
        origins: dict[str, MemberOrigin] = {}

        def take(name: str, teacher: DerivedTeacher) -> None:
            origins[name] = _origin(name, teacher, where, manifest)

        found = [partial(take, name, teacher) for name, teacher in recipe.teachers.items()]
        raise_all(caught(lambda: _require_views(views, where, manifest), *found))
        needed: dict[str, set[str]] = {}
        for origin in origins.values():
            for member in origin.weights:
                encoded = [] if origin.teacher.logits is None else [LOGITS]
                needed.setdefault(member, set()).update(origin.kept, encoded)
        ordered = {name: needed[name] for name in manifest.teachers if name in needed}
        return cls(cache.of(manifest.restricted(views, ordered)), origins)

    @property
    def reader(self) -> ShardReader:
        """A reader of all its targets and views."""
        return ShardReader(self.snapshot, views=True)

    def sample(self, name: str, num_views: int) -> CachedSample:
        """Return calibration rows for a teacher's encoding: the logits of its members in the first views."""
        members = {member: [LOGITS] for member in self.origins[name].weights}
        reader = ShardReader(self.snapshot.of(self.snapshot.manifest.restricted(num_views, members)))
        return CachedSample(reader, name, self.origins[name])

    def tables(self, name: str, target: str) -> Tables:
        """Return the tables of a copied target, by array name in the new cache."""
        (member, *_) = self.origins[name].weights
        groups = [group for group in self.snapshot.layout.of(member) if group.target == target]
        found = {key: table for group in groups for key, table in read_tables(self.snapshot.store, group).items()}
        return {f"{name}.{target}.{key}": table for key, table in found.items()}


def _require_views(views: int, where: str, manifest: Manifest) -> None:
    if views > manifest.views.num_views:
        raise RecipeError(f"num_views is {views}, {where} has {manifest.views.num_views}. Fix: at most these")


def _origin(name: str, teacher: DerivedTeacher, where: str, manifest: Manifest) -> MemberOrigin:
    """Check that the members exist, can be averaged, and have the targets that the recipe names."""
    members = teacher.members or {name: 1.0}
    if unknown := sorted(members.keys() - manifest.teachers.keys()):
        raise RecipeError(
            f"teachers.{name}: {where} has no teacher {', '.join(map(repr, unknown))}, but "
            f"{', '.join(manifest.teachers)}. Fix: name these in `members`"
        )
    entries = {member: manifest.teachers[member] for member in members}
    if teacher.logits is not None:
        _require_dense(name, where, entries)
    counts = {member: entry.num_classes for member, entry in entries.items()}
    if len(set(counts.values())) > 1:
        raise MismatchError(f"teachers.{name}: the members have different numbers of classes: {counts}. Fix: others")
    if teacher.average == "probabilities" and manifest.fingerprint.multi_label:
        raise RecipeError(
            f"teachers.{name}.average: images of any number of classes have no probabilities that add up to 1. "
            "Fix: average: logits"
        )
    total = sum(members.values())
    weights = {member: weight / total for member, weight in members.items()}
    return MemberOrigin(teacher, weights, _kept(name, teacher, entries[next(iter(entries))], where))


def _require_dense(name: str, where: str, entries: Mapping[str, TeacherEntry]) -> None:
    for member, entry in entries.items():
        stored = entry.stored_logits
        if stored is None:
            raise RecipeError(f"teachers.{name}: {where} keeps no logits of {member!r}. Fix: `keep` its features")
        if "raw logits" not in stored.form.gives:
            raise RecipeError(
                f"teachers.{name}.logits: {where} keeps of {member!r} the largest logits alone "
                f"({stored.form.kind}): what the others were is lost, and an encoding or a mean of them would err by "
                "nobody knows how much. Fix: `keep: [logits]` copies them as they are; or derive from a cache that "
                "keeps all logits"
            )


def _kept(name: str, teacher: DerivedTeacher, entry: TeacherEntry, where: str) -> tuple[str, ...]:
    """Return the targets to copy, with the features that decoding them needs."""
    asked = entry.targets if teacher.keep == "all" else teacher.keep
    if unknown := sorted(set(asked) - set(entry.targets)):
        raise RecipeError(f"teachers.{name}.keep: {where} has no {unknown}, but {list(entry.targets)}. Fix: name these")
    encoded = teacher.logits is not None
    return entry.restricted([target for target in asked if not (encoded and target == LOGITS)]).targets
