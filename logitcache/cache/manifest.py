"""The manifest: all that replaying pixels and decoding targets needs, and the check that a recipe agrees with it."""

import hashlib
import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, JsonValue, ValidationError, model_validator

from logitcache.cache.encodings import Encoding
from logitcache.device import Precision
from logitcache.errors import CacheError, MismatchError
from logitcache.models import Preprocessing
from logitcache.recipe import Component, Count, Name
from logitcache.views.canaries import NUM_CANARIES, Canary
from logitcache.views.datasets import Dataset, Fingerprint
from logitcache.views.spec import ViewSpec

FORMAT_VERSION = 1
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Column = Annotated[str, Field(max_length=200)]
MAX_PARAMETERS = 4096
VIEWS = "views"
"""Stands in array names, in a teacher's place, for what is recorded of the views themselves."""


def _not_reserved(name: str) -> str:
    if name == VIEWS:
        raise ValueError(f"{VIEWS!r} names what a cache records of the views themselves. Fix: another name")
    return name


TeacherName = Annotated[Name, AfterValidator(_not_reserved)]


class TeacherEntry(Component):
    """Who answered, and how the answers are kept."""

    model: JsonValue
    weights: Digest
    preprocessing: Preprocessing
    precision: Precision
    num_classes: Count
    logits: Encoding


class Manifest(Component):
    """The contract between the two stages, stored in the root attributes under `logitcache`.

    `row_checksums` and `parameters` say what is recorded of every view besides the teachers' answers: the checksum of
    its pixels, and the named numbers that its augmentations drew; None where these are not recorded.
    """

    format_version: Literal[1] = 1
    dataset: Dataset | None
    fingerprint: Fingerprint
    views: ViewSpec
    image_shape: tuple[Count, Count, Count]
    shard_rows: Count
    row_checksums: bool = False
    parameters: Annotated[tuple[Column, ...], Field(max_length=MAX_PARAMETERS)] | None = None
    teachers: Annotated[dict[TeacherName, TeacherEntry], Field(min_length=1)]
    canaries: Annotated[tuple[Canary, ...], Field(min_length=1, max_length=NUM_CANARIES)]
    versions: dict[str, str]

    @model_validator(mode="after")
    def _canaries_exist(self) -> Self:
        for canary in self.canaries:
            if not (0 <= canary.view < self.views.num_views and 0 <= canary.index < self.num_images):
                raise ValueError(f"a canary of view {canary.view}, image {canary.index}, which do not exist")
        return self

    @property
    def num_images(self) -> int:
        """Images in the data set."""
        return self.fingerprint.num_images

    def digest(self) -> str:
        """Return the sha256 that identifies the cache, as hex."""
        return _digest(self.model_dump(mode="json"))

    def restricted(self, num_views: int, teachers: Sequence[str]) -> Self:
        """Return what a cache of the first views and of some teachers has in common with this one.

        Canaries stay those of all views.
        """
        chosen = {name: self.teachers[name] for name in teachers}
        views = self.views.model_copy(update={"num_views": num_views})
        return self.model_copy(update={"views": views, "teachers": chosen})

    def content_digest(self) -> str:
        """Return the sha256 of what decides every target and pixel, as hex: the same after a cache has grown.

        Of a manifest that is restricted to what a student began with. Neither where images lie nor which versions and
        canaries prove them counts.
        """
        return _digest(self.model_dump(mode="json", exclude={"dataset", "canaries", "versions"}))

    def attributes(self) -> dict[str, Any]:
        """Return the stored form, with its own sha256."""
        stored = self.model_dump(mode="json")
        return {"format_version": FORMAT_VERSION, "manifest": stored, "sha256": _digest(stored)}


def _digest(stored: object) -> str:
    return hashlib.sha256(json.dumps(stored, sort_keys=True).encode()).hexdigest()


def parse_manifest(attributes: object, where: str) -> Manifest:
    """Read the stored form; raise CacheError when it is of another format or was changed."""
    entry = attributes.get("logitcache") if isinstance(attributes, dict) else None
    if not isinstance(entry, dict):
        raise CacheError(f"{where} is a Zarr store, but not a logitcache cache: its attributes have no 'logitcache'")
    if entry.get("format_version") != FORMAT_VERSION:
        raise CacheError(
            f"{where} has format version {entry.get('format_version')!r}, this release reads {FORMAT_VERSION}. "
            "Fix: install the release of logitcache that wrote it"
        )
    try:
        if entry.get("sha256") != _digest(entry.get("manifest")):
            raise CacheError(
                f"{where}: the manifest is damaged (its sha256 differs). Fix: restore zarr.json, or remove {where} and "
                "precompute again"
            )
        return Manifest.model_validate_json(json.dumps(entry["manifest"]))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "all of it"
        raise CacheError(f"{where}: the manifest is not valid: {place}: {first['msg']}") from error
    except RecursionError as error:
        raise CacheError(f"{where}: the manifest is not valid: it is nested too deeply") from error


def _differences(recorded: Manifest, wanted: Manifest) -> list[str]:
    """List what no cache can change."""
    lines = []
    for key in type(recorded.views).model_fields:
        old, new = getattr(recorded.views, key), getattr(wanted.views, key)
        if old != new and key != "num_views":
            lines.append(f"views.{key}: the cache has {_short(old)}, the recipe {_short(new)}")
    if recorded.image_shape != wanted.image_shape:
        lines.append(f"view shape: the cache has {recorded.image_shape}, the recipe gives {wanted.image_shape}")
    for key in ("shard_rows", "row_checksums", "parameters"):
        old, new = getattr(recorded, key), getattr(wanted, key)
        if old != new:
            lines.append(f"{key}: the cache has {_short(old)}, the recipe {_short(new)}")
    for name in sorted(recorded.teachers.keys() & wanted.teachers.keys()):
        lines += _teacher_differences(name, recorded.teachers[name], wanted.teachers[name])
    return lines


def _lacks(recorded: Manifest, wanted: Manifest) -> list[str]:
    """List what the cache has and the recipe does not ask for."""
    old, new = recorded.views.num_views, wanted.views.num_views
    lines = [f"views.num_views: the cache has {old}, the recipe {new}"] if new < old else []
    return lines + [f"teachers.{name}: only in the cache" for name in recorded.teachers if name not in wanted.teachers]


def _adds(recorded: Manifest, wanted: Manifest) -> list[str]:
    """List what the recipe asks for and the cache does not have."""
    old, new = recorded.views.num_views, wanted.views.num_views
    lines = [f"views.num_views: the cache has {old}, the recipe {new}"] if new > old else []
    return lines + [f"teachers.{name}: only in the recipe" for name in wanted.teachers if name not in recorded.teachers]


def _teacher_differences(name: str, recorded: TeacherEntry, wanted: TeacherEntry) -> list[str]:
    fields = ("weights", "preprocessing", "precision", "num_classes", "logits")
    pairs = [(key, getattr(recorded, key), getattr(wanted, key)) for key in fields]
    return [
        f"teachers.{name}.{key}: the cache has {_short(a)}, the recipe {_short(b)}" for key, a, b in pairs if a != b
    ]


def _short(value: object) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_short(item) for item in value) + "]"
    if isinstance(value, Component):
        text = json.dumps(value.model_dump(mode="json", exclude={"ratio_knots", "thresholds"}))
        return text if len(text) < 200 else text[:200] + "…"
    return repr(value)


def extends(wanted: Manifest, recorded: Manifest) -> bool:
    """Whether what is wanted is all that is recorded, or more: further views and teachers."""
    return not _differences(recorded, wanted) and not _lacks(recorded, wanted)


def is_more(wanted: Manifest, recorded: Manifest) -> bool:
    """Whether more views or teachers are wanted than are recorded."""
    return bool(_adds(recorded, wanted))


def require_growth(recorded: Manifest, wanted: Manifest, where: str) -> None:
    """Raise MismatchError listing every way in which a recipe is another than one that continues or extends a cache."""
    lines = _differences(recorded, wanted)
    lacks = _lacks(recorded, wanted)
    # More views and teachers are no fault, but tell a recipe of other teachers from one that leaves some out.
    if lines or lacks:
        raise MismatchError(
            f"{where} was made by another recipe:\n  "
            + "\n  ".join([*lines, *lacks, *(_adds(recorded, wanted) if lacks else [])])
            + "\n  Fix: change the recipe back to continue this cache (it may add views and teachers), "
            "or give the new one another `cache:` path"
        )
