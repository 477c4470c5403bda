"""Derived caches: the manifest names the teachers of the source in place of a teacher's model."""

import hashlib
import json
from typing import Annotated, Literal

from pydantic import Field, JsonValue, ValidationError

from logitcache.cache.encodings import Encoding
from logitcache.cache.format.manifest import Digest, Manifest, TeacherEntry, TeacherName
from logitcache.classifier import Preprocessing
from logitcache.config.recipe import Component, Positive
from logitcache.errors import CacheError, MismatchError

MeanOf = Literal["logits", "probabilities"]
"""logits: the mean of logits. probabilities: the mean of softmax(z / T), kept as the logits that give it at T."""


class Member(Component):
    """A teacher of the source, how much it counts, and as what its logits were kept there."""

    weight: Positive
    weights: Digest
    preprocessing: Preprocessing
    model: JsonValue
    logits: Encoding | None


class Derivation(Component):
    """How a teacher's answers were made from those in another cache, whose content digest is `source`.

    `weight`s add up to 1. One member is the teacher itself; `average` names how several become one.
    """

    kind: Literal["derived"] = "derived"
    source: Digest
    members: Annotated[dict[TeacherName, Member], Field(min_length=1)]
    average: MeanOf | None = None
    temperature: Positive | None = None

    def digest(self) -> str:
        """Return what stands for the weights: those of the only member, or the sha256 of all that decides a mean."""
        if len(self.members) == 1:
            return next(iter(self.members.values())).weights
        members = {name: [member.weights, member.weight] for name, member in self.members.items()}
        decided = {"members": members, "average": self.average, "temperature": self.temperature}
        return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()


def derivation_of(entry: TeacherEntry) -> Derivation | None:
    """Return how a teacher's answers were derived; None if the teacher gave them itself. Raises CacheError."""
    if not (isinstance(entry.model, dict) and entry.model.get("kind") == "derived"):
        return None
    try:
        return Derivation.model_validate_json(json.dumps(entry.model))
    except (ValidationError, RecursionError) as error:
        raise CacheError(f"the manifest lacks how the cache was derived: {error}. Fix: derive it again") from error


def network_of(name: str, entry: TeacherEntry) -> JsonValue:
    """Return the recorded entry of the network that answered, through re-encodings.

    Raises MismatchError if no network alone did: the answers are the mean of several.
    """
    derivation = derivation_of(entry)
    if derivation is None:
        return entry.model
    if len(derivation.members) > 1:
        raise MismatchError(
            f"teacher {name!r} is the mean of {', '.join(derivation.members)}, made by `logitcache derive`: no network "
            "gives its answers. Fix: a cache of these teachers themselves, and `ensembles:` in the student's recipe"
        )
    (inner,) = derivation.members.values()
    return network_of(name, entry.model_copy(update={"model": inner.model}))


def require_not_derived(manifest: Manifest, where: str) -> None:
    """Raise MismatchError for a cache that no teacher filled: precompute cannot add to it."""
    if derived := _derived(manifest):
        raise MismatchError(
            f"{where} was derived from another cache ({', '.join(derived)}): a teacher's own answers are "
            "no part of it. Fix: let precompute add to the source, then derive again to another path; `logitcache "
            "derive` with the recipe that made it continues and repairs it"
        )


def is_derived(manifest: Manifest) -> bool:
    """Whether `logitcache derive` made a cache."""
    return bool(_derived(manifest))


def _derived(manifest: Manifest) -> list[str]:
    """Name the derived teachers and their members."""
    found = {name: derivation_of(entry) for name, entry in manifest.teachers.items()}
    return [f"{name} of {' and '.join(one.members)}" for name, one in found.items() if one is not None]


def fix_of_damage(manifest: Manifest) -> str:
    """Return what writes the bytes that a cache lacks: the command that made it, according to its manifest."""
    try:
        command = f"the same `logitcache {'derive' if is_derived(manifest) else 'precompute'}` command"
    except CacheError:  # the manifest does not state how it was derived
        command = "the command that made it"
    return f"Fix: run {command} again, which writes just what is missing or damaged"


def fix_of_contents(fix: str) -> str:
    """Return what replaces a file that matches its record and holds nothing sound, by the fix of lost ones."""
    return f"Fix: remove it; {fix.removeprefix('Fix: ')}"
