"""The manifest: everything that replaying pixels and decoding targets needs."""

import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, JsonValue, PlainSerializer, ValidationError, model_validator

from logitcache.cache.encodings import Encoding, Form
from logitcache.cache.encodings.features import Feature, FeatureForm
from logitcache.cache.format.appended import MOST_CANARIES, Appended
from logitcache.cache.format.row_errors import RowErrors
from logitcache.classifier import Preprocessing, Variant
from logitcache.config.mistakes import first_mistake
from logitcache.config.recipe import Count, Extended, Name, Positive
from logitcache.errors import CacheError
from logitcache.runtime.device import Precision
from logitcache.views.canaries import NUM_CANARIES, Canary
from logitcache.views.datasets import Dataset
from logitcache.views.datasets.base import Fingerprint, names_digest
from logitcache.views.mixing.partners import Partners
from logitcache.views.spec import ViewSpec

FORMAT_VERSION = 1
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Column = Annotated[str, Field(max_length=200)]
MAX_PARAMETERS = 4096
LOGITS = "logits"
"""Name of the logits among a teacher's targets, beside the names of its features."""

VIEWS = "views"
"""Prefix, in place of a teacher's name, of the arrays with checksums and parameters of the views."""


def _other_than(taken: str, names: str) -> AfterValidator:
    """Reject a reserved name; `names` describes its meaning."""

    def require_other(name: str) -> str:
        if name == taken:
            raise ValueError(f"{taken!r} names {names}. Fix: another name")
        return name

    return AfterValidator(require_other)


TeacherName = Annotated[Name, _other_than(VIEWS, "what a cache records of the views themselves")]
FeatureName = Annotated[Name, _other_than(LOGITS, "the logits of a teacher")]


ERROR_TEMPERATURES = (1.0, 4.0)
"""Temperatures at which the errors of logits are recorded: losses on probabilities mostly take one from 1 to 4."""

MAX_TEMPERATURES = 16


class StoredLogits(Extended):
    """Stored form of logits: the fitted encoding, and the SHA-256 of each of its tables.

    `calibration_views` is the number of views that the calibration rows of the tables were drawn from, and
    `calibration_rows` the number of rows requested; releases that did not record it took `num_calibration_rows`.
    `error_temperatures` are those at which the errors of rows are recorded; the first release, which did not record
    them, took one.
    """

    added: ClassVar[frozenset[str]] = frozenset({"calibration_rows", "error_temperatures"})

    form: Form
    tables: dict[Name, Digest] = Field(default_factory=dict)
    calibration_views: Count | None = None
    calibration_rows: Count | None = None
    error_temperatures: Annotated[tuple[Positive, ...], Field(max_length=MAX_TEMPERATURES)] | None = None

    @classmethod
    def measured(cls, form: Form, asked: Encoding, **tables: Any) -> Self:
        """Return the record of a new target, with errors at `ERROR_TEMPERATURES` and at the temperature of a budget."""
        temperatures = () if form.exact else tuple(sorted({*ERROR_TEMPERATURES, asked.temperature_of_errors}))
        return cls(form=form, error_temperatures=temperatures, **tables)


class StoredFeature(Extended):
    """Stored form of a feature, and its shape without the batch."""

    added: ClassVar[frozenset[str]] = frozenset({"calibration_rows"})

    shape: Annotated[tuple[Count, ...], Field(min_length=1, max_length=3)]
    form: FeatureForm
    tables: dict[Name, Digest] = Field(default_factory=dict)
    calibration_views: Count | None = None
    calibration_rows: Count | None = None


Output = Annotated[int, Field(ge=0, lt=2**31)]
"""Index of an output of a network."""


class TeacherEntry(Extended):
    """A teacher, its targets as the recipe names them, and their stored forms.

    `classes` are the outputs of the network that are the logits, in order; None if all are. Stored forms are chosen
    once, by calibration, when the teacher joins the cache, and so is `speed`, the variant of its network (None if
    plain); `errors`, over all rows, are recorded when the cache is complete.
    """

    added: ClassVar[frozenset[str]] = frozenset({"classes", "speed"})

    # Serialized unchanged: pydantic's own serializer of a JsonValue takes 40 times as long.
    model: Annotated[JsonValue, PlainSerializer(lambda value: value, return_type=Any)]
    weights: Digest
    preprocessing: Preprocessing
    precision: Precision
    speed: Variant | None = None
    num_classes: Count | None
    classes: tuple[Output, ...] | None = None
    logits: Encoding | None
    features: dict[FeatureName, Feature] = Field(default_factory=dict)
    stored_logits: StoredLogits | None = None
    stored_features: dict[FeatureName, StoredFeature] = Field(default_factory=dict)
    errors: dict[Name, RowErrors | Annotated[tuple[RowErrors, ...], Field(max_length=MAX_TEMPERATURES)]] = Field(
        default_factory=dict
    )

    @property
    def error_temperatures(self) -> tuple[float, ...] | None:
        """The temperatures at which the errors of logits are recorded; none if they are exact, None if not recorded."""
        if self.logits is None or self.stored_logits is None:
            return None
        if self.stored_logits.error_temperatures is not None:
            return self.stored_logits.error_temperatures
        return (self.logits.temperature_of_errors,) if self.logits.measured else None

    def errors_of(self, target: str) -> tuple[RowErrors, ...]:
        """Return the errors over all rows of a target, by temperature; empty before they are recorded."""
        errors = self.errors.get(target, ())
        return errors if isinstance(errors, tuple) else (errors,)

    @model_validator(mode="after")
    def _classes_are_counted(self) -> Self:
        if self.classes is not None and len(self.classes) != self.num_classes:
            raise ValueError(f"{len(self.classes)} outputs are the logits of {self.num_classes} classes")
        return self

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the targets: `logits`, and the features."""
        return (*([] if self.logits is None else [LOGITS]), *self.features)

    @property
    def unfitted(self) -> tuple[str, ...]:
        """Targets without a stored form yet."""
        stored = {*([] if self.stored_logits is None else [LOGITS]), *self.stored_features}
        return tuple(name for name in self.targets if name not in stored)

    def restricted(self, targets: Collection[str]) -> Self:
        """Return the entry with some of its targets; `head` also keeps the feature that it needs."""
        form = None if self.stored_logits is None else self.stored_logits.form
        needed = {*targets, *([] if form is None or LOGITS not in targets else form.needs)}
        update: dict[str, Any] = {
            key: {name: value for name, value in getattr(self, key).items() if name in needed}
            for key in ("features", "stored_features", "errors")
        }
        if LOGITS not in needed:
            update |= {"logits": None, "stored_logits": None}
        return self.model_copy(update=update)

    def with_stored(self, known: "TeacherEntry") -> Self:
        """Return the entry with the stored forms of a known one, for the targets of both."""
        update = {
            "stored_logits": known.stored_logits if self.logits is not None else None,
            "stored_features": {name: known.stored_features[name] for name in self.features if name in known.features},
            "errors": {name: errors for name, errors in known.errors.items() if name in self.targets},
        }
        return self.model_copy(update=update)


class Manifest(Extended):
    """The contract between the two stages, stored in the root attributes under `logitcache`.

    `row_checksums` and `parameters` are recorded of every view besides the teachers' answers: the checksum of
    its pixels, and the named numbers that its augmentations drew; None if these are not recorded. `class_names` are
    those of the images' classes; None if they have none, or if these are not recorded. `appended` is None unless images
    were appended.
    """

    added: ClassVar[frozenset[str]] = frozenset({"class_names", "appended"})

    format_version: Literal[1] = 1
    dataset: Dataset | None
    fingerprint: Fingerprint
    views: ViewSpec
    image_shape: tuple[Count, Count, Count]
    shard_rows: Count
    row_checksums: bool = False
    parameters: Annotated[tuple[Column, ...], Field(max_length=MAX_PARAMETERS)] | None = None
    teachers: Annotated[dict[TeacherName, TeacherEntry], Field(min_length=1)]
    canaries: Annotated[tuple[Canary, ...], Field(min_length=1, max_length=NUM_CANARIES + MOST_CANARIES)]
    versions: dict[str, str]
    class_names: tuple[str, ...] | None = None
    appended: Appended | None = None

    @model_validator(mode="after")
    def _class_names_are_those_of_the_images(self) -> Self:
        if self.class_names is not None and names_digest(self.class_names) != self.fingerprint.class_names:
            raise ValueError("class names other than those that the fingerprint is of")
        return self

    @model_validator(mode="after")
    def _first_images_are_known(self) -> Self:
        if (count := sum(canary.index < self.first.num_images for canary in self.canaries)) > NUM_CANARIES:
            raise ValueError(f"{count} canaries of the first images, {NUM_CANARIES} at most")
        if self.appended is not None:
            self.appended.require_bounded(self.num_images)
        for canary in self.canaries:
            if not (0 <= canary.view < self.views.num_views and 0 <= canary.index < self.num_images):
                raise ValueError(f"a canary of view {canary.view}, image {canary.index}, which do not exist")
        return self

    @property
    def num_images(self) -> int:
        """Number of images."""
        return self.fingerprint.num_images

    @property
    def extent(self) -> tuple[int, str]:
        """The number of images, and the digest of the first images' ids, which identify the cache after it grows."""
        return self.num_images, self.first.ids

    @property
    def first(self) -> Fingerprint:
        """Fingerprint of the images that the cache began with."""
        return self.fingerprint if self.appended is None else self.appended.first

    def partners(self, views: ViewSpec) -> Partners | None:
        """Return the pairs of images that some views mix; None if they mix none."""
        return views.partners(self.num_images, self.first.num_images)

    def digest(self) -> str:
        """Return the sha256 that identifies the cache, as hex."""
        return _digest(self.model_dump(mode="json"))

    @property
    def targets(self) -> dict[str, tuple[str, ...]]:
        """Names of the targets of each teacher."""
        return {name: entry.targets for name, entry in self.teachers.items()}

    def restricted(self, num_views: int, targets: Mapping[str, Collection[str]]) -> Self:
        """Return the manifest of the first views, and of some targets of some teachers.

        Canaries of all views are kept.
        """
        chosen = {name: self.teachers[name].restricted(kept) for name, kept in targets.items()}
        views = self.views.model_copy(update={"num_views": num_views})
        return self.model_copy(update={"views": views, "teachers": chosen})

    def content_digest(self) -> str:
        """Return the sha256 of all entries that determine targets and pixels, as hex: the same after a cache has grown.

        Call it on a manifest that is restricted to the views and targets of a student. The location of the images,
        versions and canaries do not count; the names of classes count by their digest.
        """
        without: Any = dict.fromkeys(("dataset", "canaries", "versions", "class_names"), True)
        without["teachers"] = {"__all__": {"errors": True}}
        without |= {"appended": True} if self.first == self.fingerprint else {}
        return _digest(self.model_dump(mode="json", exclude=without))

    def attributes(self) -> dict[str, Any]:
        """Return the stored form, with its own sha256."""
        stored = self.model_dump(mode="json")
        return {"format_version": FORMAT_VERSION, "manifest": stored, "sha256": _digest(stored)}


def _digest(stored: object) -> str:
    return hashlib.sha256(json.dumps(stored, sort_keys=True).encode()).hexdigest()


def parse_manifest(attributes: object, where: str) -> Manifest:
    """Parse the stored form; raise CacheError if it has another format version or was changed."""
    entry = attributes.get("logitcache") if isinstance(attributes, dict) else None
    if not isinstance(entry, dict):
        raise CacheError(
            f"{where} is a Zarr store, but not a logitcache cache: its attributes have no 'logitcache'. "
            "Fix: name a folder or URL that `logitcache precompute` or `logitcache derive` has filled"
        )
    if entry.get("format_version") != FORMAT_VERSION:
        raise CacheError(
            f"{where} has format version {entry.get('format_version')!r}, this release reads {FORMAT_VERSION}. "
            "Fix: install the release of logitcache that wrote it"
        )
    try:
        if entry.get("sha256") != _digest(entry.get("manifest")):
            raise CacheError(
                f"{where}: the manifest is damaged (its sha256 differs). Fix: restore zarr.json, or remove {where} and "
                "make it again"
            )
        return Manifest.model_validate_json(json.dumps(entry["manifest"]))
    except ValidationError as error:
        raise CacheError(f"{where}: the manifest is not valid: {first_mistake(error)}") from error
    except RecursionError as error:
        raise CacheError(f"{where}: the manifest is not valid: it is nested too deeply") from error
