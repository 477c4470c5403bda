"""Growth: what a cache is to become, while its root still describes what it is.

Further views and teachers are written beside the cache; nobody reads them yet. When all of it is committed, the
arrays' metadata and then, in one atomic step, the root describe the grown cache: readers see the old state or the new.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from logitcache.cache.format.layout import layout_of, require_possible
from logitcache.cache.format.manifest import Manifest, TeacherEntry, TeacherName
from logitcache.cache.format.manifest_diff import extends, is_more
from logitcache.cache.format.metadata import GROWING
from logitcache.config.recipe import Component, Count
from logitcache.errors import CacheError
from logitcache.store.base import Store
from logitcache.store.files import explained, sync_directory
from logitcache.store.safe_files import parse_json


class Growth(Component):
    """How many views and which teachers, with which targets, a cache is to have, in the order of the recipe."""

    num_views: Count
    teachers: Annotated[dict[TeacherName, TeacherEntry], Field(min_length=1)]
    versions: dict[str, str]

    def applied(self, recorded: Manifest) -> Manifest:
        """Return the manifest of the grown cache: what is recorded of the rest stays."""
        views = recorded.views.model_copy(update={"num_views": self.num_views})
        update: dict[str, Any] = {"views": views, "teachers": self.teachers, "versions": self.versions}
        return recorded.model_copy(update=update)


def grown(recorded: Manifest, begun: Manifest, wanted: Manifest) -> Manifest:
    """Return the manifest that `wanted` makes of a cache; `begun` has what earlier runs began to add.

    New targets have no form yet. The canaries stay those of the first run: one that adds to a cache proves by them that
    it renders the same views. As the metadata is written anew, it names the zarr that does.
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
    ).applied(recorded)


def read_growth(store: Store, recorded: Manifest) -> Manifest:
    """Return what a cache is growing to; what is recorded if it is not growing.

    A note that does not extend what is recorded is none: storage may apply a write that was retried once more, after
    the growth is finished and its note removed.
    """
    where = f"{store}/{GROWING}"
    try:
        data = store.read(GROWING)
    except FileNotFoundError:
        return recorded
    try:
        parse_json(data)
        growth = Growth.model_validate_json(data)
    except ValueError as error:
        raise CacheError(
            f"{where} is damaged: it does not describe what the cache was growing to. Fix: give this growth up "
            f"(`logitcache gc {store} --growth`), then run precompute again"
        ) from error
    manifest = growth.applied(recorded)
    if not (is_more(manifest, recorded) and extends(manifest, recorded)):
        return recorded
    require_possible(manifest, where)
    return manifest


def begin_growth(store: Store, goal: Manifest, tables: Mapping[str, bytes]) -> None:
    """Note what a cache is growing to, before the first shard of it, and make room for the shards.

    The tables of what is new, bytes by key, come first: the note names their digests.
    """
    root = store.path
    for key, values in tables.items():
        with explained(root / key):
            (root / key).parent.mkdir(parents=True, exist_ok=True)
        store.write(key, values)
    growth = Growth(num_views=goal.views.num_views, teachers=goal.teachers, versions=goal.versions)
    data = json.dumps(growth.model_dump(mode="json")).encode()
    if not store.holds(GROWING, data):
        store.write(GROWING, data)
    for group in layout_of(goal).groups:
        for name in (group.commits, *(array.name for array in group.arrays)):
            with explained(root / name):
                (root / name).mkdir(exist_ok=True)
    with explained(root):
        sync_directory(root)


def forget_growth(store: Store, recorded: Manifest) -> None:
    """Remove the note of a growth that the root describes already; another run may have begun to add even more."""
    if store.exists(GROWING) and read_growth(store, recorded) == recorded:
        with explained(store.path / GROWING):
            store.remove([GROWING])
