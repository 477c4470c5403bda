"""Growth: the note of the cache that an existing one grows to, while its root still describes the old state.

New views, teachers and images are written beside the cache; no reader opens them yet. When all are committed, the
metadata of the arrays and then, in one atomic step, the root are replaced: readers see the old state or the new one.
If images are appended, longer versions of the short last shards are staged, and replace these before the root changes.
"""

from contextlib import suppress
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from logitcache.cache.format.appended import MOST_CANARIES, Appended
from logitcache.cache.format.arrays import Staged
from logitcache.cache.format.layout import require_possible, staged_between
from logitcache.cache.format.manifest import Manifest, TeacherEntry, TeacherName
from logitcache.cache.format.manifest_diff import extends, is_more
from logitcache.cache.format.root import GROWING, read_manifest
from logitcache.config.recipe import Component, Count, Extended
from logitcache.errors import CacheError
from logitcache.store.base import Store
from logitcache.store.safe_files import parse_json
from logitcache.views.canaries import NUM_CANARIES, Canary
from logitcache.views.datasets import Dataset
from logitcache.views.datasets.base import Fingerprint

GROWING_IDS = "digest/growing.ids"
"""The ids of all images of the grown cache, in its order."""


class NewImages(Component):
    """The images of the grown cache, where they lie, and the staged shards, which become longer."""

    dataset: Dataset | None
    fingerprint: Fingerprint
    appended: Appended
    canaries: Annotated[tuple[Canary, ...], Field(max_length=NUM_CANARIES + MOST_CANARIES)]
    staged: Staged | None

    @model_validator(mode="after")
    def _ids_are_bounded(self) -> "NewImages":
        self.appended.require_bounded(self.fingerprint.num_images)
        return self

    @classmethod
    def between(cls, recorded: Manifest, wanted: Manifest) -> "NewImages | None":
        """Describe the images of `wanted`, of which the cache has the first; None if it has them all."""
        if wanted.num_images == recorded.num_images:
            return None
        assert wanted.appended is not None
        given = {key: getattr(wanted, key) for key in ("dataset", "fingerprint", "appended", "canaries")}
        return cls(**given, staged=staged_between(recorded, wanted))

    def added_to(self, manifest: Manifest) -> Manifest:
        """Return a manifest with these images."""
        update: dict[str, Any] = {key: getattr(self, key) for key in ("dataset", "fingerprint", "appended", "canaries")}
        return manifest.model_copy(update=update)


class Growth(Extended):
    """The number of views, the teachers with their targets, and the images of the grown cache.

    Teachers are in the order of the recipe; `images` is None if none are appended.
    """

    added: ClassVar[frozenset[str]] = frozenset({"images"})

    num_views: Count
    teachers: Annotated[dict[TeacherName, TeacherEntry], Field(min_length=1)]
    versions: dict[str, str]
    images: NewImages | None = None

    def applied(self, recorded: Manifest) -> Manifest:
        """Return the manifest of the grown cache; all other entries are the recorded ones."""
        views = recorded.views.model_copy(update={"num_views": self.num_views})
        update: dict[str, Any] = {"views": views, "teachers": self.teachers, "versions": self.versions}
        manifest = recorded.model_copy(update=update)
        return manifest if self.images is None else self.images.added_to(manifest)


def grown(recorded: Manifest, begun: Manifest, wanted: Manifest) -> Manifest:
    """Return the manifest of a cache that grows to `wanted`; `begun` is the growth that earlier runs began.

    New targets have no form yet. The canaries of the first run stay: a run that adds to the cache proves with them that
    it renders the same views. The metadata is written again, so `versions` names this zarr.
    """
    if not is_more(wanted, recorded):
        return recorded
    return Growth(
        num_views=wanted.views.num_views,
        teachers={
            name: entry.with_stored(begun.teachers[name]) if name in begun.teachers else entry
            for name, entry in wanted.teachers.items()
        },
        versions=recorded.versions | {"zarr": wanted.versions["zarr"]},
        images=NewImages.between(recorded, wanted),
    ).applied(recorded)


def read_growth(store: Store, recorded: Manifest) -> Manifest:
    """Return the manifest that a cache grows to; the recorded one if it does not grow.

    A note that does not extend the recorded manifest is ignored: object storage may apply a retried write again, after
    the growth has ended and its note was removed.
    """
    growth = read_note(store)
    if growth is None:
        return recorded
    manifest = growth.applied(recorded)
    if not (is_more(manifest, recorded) and extends(manifest, recorded)):
        return recorded
    require_possible(manifest, f"{store}/{GROWING}")
    return manifest


def read_note(store: Store) -> Growth | None:
    """Read the note of a growth; None if the cache has none. Raises CacheError if it is damaged."""
    try:
        data = store.read(GROWING)
    except FileNotFoundError:
        return None
    try:
        parse_json(data)
        return Growth.model_validate_json(data)
    except ValueError as error:
        raise CacheError(
            f"{store}/{GROWING} is damaged: it does not describe what the cache was growing to. Fix: give this growth "
            f"up (`logitcache gc {store} --growth`), then run precompute again"
        ) from error


def outgrown_to(store: Store, num_images: int, first_ids: str) -> list[Manifest]:
    """Return the manifests of the root and of a growth that have more than `num_images` images.

    `first_ids` is the digest of the ids of the images that the cache began with.
    """
    goals = [read_manifest(store)]
    with suppress(CacheError):  # a damaged note
        goals.append(read_growth(store, goals[0]))
    return [goal for goal in goals if goal.num_images > num_images and goal.first.ids == first_ids]


def is_outgrown(store: Store, num_images: int, first_ids: str) -> bool:
    """Whether the files of a cache may hold more images than a manifest with `num_images` describes."""
    return bool(outgrown_to(store, num_images, first_ids))
