"""Verify a cache, its images included, and repair it by the recipe that made it."""

import functools
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from logitcache.cache.cache import Cache
from logitcache.cache.format.derivation import is_derived
from logitcache.cache.format.manifest import Manifest
from logitcache.cache.pairs.record import Pairing
from logitcache.cache.replay import require_trusted
from logitcache.cache.snapshot import open_snapshot
from logitcache.cache.verify import verify_cache
from logitcache.errors import DataError, RecipeError, RefusedError
from logitcache.report.images import locate_images
from logitcache.runtime.tables import as_text
from logitcache.views.datasets.custom import Custom

if TYPE_CHECKING:
    from logitcache.teacher.teacher import TeacherSource


@dataclass(frozen=True)
class VerifyResult:
    """What was compared. `images` is "the same" or "not compared", `note` the reason; `fix` repairs `problems`."""

    cache: str
    shards: int
    bytes: int
    images: str
    note: str | None
    problems: tuple[str, ...]
    fix: str | None

    @property
    def error(self) -> str | None:
        """One line that sums up the problems; None without any."""
        count = len(self.problems)
        return f"{self.cache}: {self.note} ({count} problem{'s' * (count > 1)}). Fix: {self.fix}" if count else None

    @property
    def text(self) -> str:
        """A table of the figures, then a line for each problem."""
        figures = {name: value for name, value in vars(self).items() if name != "fix"}
        return as_text(figures | {"problems": len(self.problems)}) + "".join(f"{text}\n" for text in self.problems)


def verify(
    path: str | Path,
    overrides: Sequence[str] = (),
    trust: Collection[str] = (),
    pairing: str | Path | None = None,
) -> VerifyResult:
    """Read every stored byte; compare the images if they can be found, and the parameters if they are recorded.

    With a `pairing` its images and canaries are compared in place of the cache's. `overrides` such as
    `dataset.root=DIR` locate the images; without any, images that are gone are reported and are no fault of the cache.
    `trust` has the digests of caches that may name images at URLs. Raises MismatchError for other images, pixels or
    plans, RefusedError for images that are not opened.
    """
    snapshot = open_snapshot(path, fresh=True)
    found = verify_cache(snapshot)
    cache, problems = Cache(snapshot), found.problems
    images, fix = "not compared", None
    if not problems:
        note = _compare_images(cache, overrides, trust, None if pairing is None else cache.pairing(pairing))
        images = "the same" if note is None else images
    elif all(problem.endswith("not committed") for problem in problems):
        note, fix = "the cache is incomplete", snapshot.fix.removeprefix("Fix: ")
    else:
        command = shlex.join(["logitcache", "verify", cache.location, "--repair"])
        note, fix = "the cache is damaged", f"run `{command} RECIPE`, which writes just that again"
    return VerifyResult(str(snapshot.store), found.shards, found.bytes, images, note, problems, fix)


def repair(
    path: str | Path, recipe: str | Path, overrides: Sequence[str] = (), trust: Collection[str] = ()
) -> VerifyResult:
    """Verify a cache, write exactly what is damaged again by the recipe that made it, and verify again.

    `overrides` change the recipe, of precompute or derive; the cache to fill is this one. Views, teachers, logits and
    features that the recipe asks for beyond the cache are not added. Raises as these do if the recipe is another one,
    or if the cache cannot be repaired.
    """
    # Stage one, which `verify` does without.
    from logitcache.report.load_own import load_own
    from logitcache.stage_one.derive.derive import DeriveRecipe, derive
    from logitcache.stage_one.precompute import PrecomputeRecipe, precompute

    snapshot = open_snapshot(path, fresh=True)
    manifest = snapshot.manifest
    if is_derived(manifest):
        derivation = load_own(recipe, DeriveRecipe, overrides)
        changes: dict[str, Any] = {"out": str(path), "num_views": manifest.views.num_views}
        run = functools.partial(derive, derivation.model_copy(update=changes))
    else:
        filled = load_own(recipe, PrecomputeRecipe, overrides)
        views = filled.views.model_copy(update={"num_views": manifest.views.num_views})
        changes = {"cache": str(path), "views": views, "teachers": _kept(filled.teachers, manifest) or filled.teachers}
        run = functools.partial(precompute, filled.model_copy(update=changes))
    # Digests that it finds are remembered: the run need not read every byte again.
    verify_cache(snapshot)
    run()
    return verify(path, trust=trust)


def _kept(sources: Mapping[str, "TeacherSource"], manifest: Manifest) -> dict[str, "TeacherSource"]:
    """Restrict the teachers of a recipe to what a cache keeps of them."""
    kept = {}
    for name in (name for name in sources if name in manifest.teachers):
        source, entry = sources[name], manifest.teachers[name]
        features = {feature: value for feature, value in source.features.items() if feature in entry.features}
        logits = None if entry.logits is None else source.logits
        if features or logits is not None:
            kept[name] = source.model_copy(update={"features": features, "logits": logits})
    return kept


def _compare_images(
    cache: Cache, overrides: Sequence[str], trust: Collection[str], pairing: Pairing | None
) -> str | None:
    """Return why the images of a cache, or of its pairing, cannot be compared; None if they are the same."""
    recorded = cache.manifest.dataset if pairing is None else pairing.record.dataset
    theirs = recorded is None or isinstance(recorded, Custom)
    if overrides:
        place = locate_images(recorded, overrides)
        views = cache.views(place.dataset, factories=place.factories, pairing=pairing)
        if pairing is None:
            cache.require_parameters(views)
        return None
    if theirs:
        return "they came from the user's own code: give --set dataset=…"
    try:
        require_trusted(cache.manifest.views, (), cache.location)
    except RecipeError as error:
        return str(error)
    try:
        views = cache.views(trust=trust, pairing=pairing)
        if pairing is None:
            cache.require_parameters(views)
    except RefusedError:
        raise
    except (DataError, RecipeError) as error:
        return f"give --set dataset.root=…, or other keys of the data set: {str(error).splitlines()[0]}"
    return None
