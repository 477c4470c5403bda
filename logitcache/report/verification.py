"""Everything that can be wrong with a cache, told at once."""

import functools
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from logitcache.cache.cache import Cache
from logitcache.cache.foreign_code import require_trusted
from logitcache.cache.format.derivation import is_derived
from logitcache.cache.format.manifest import Manifest
from logitcache.cache.snapshot import open_snapshot
from logitcache.cache.verify import verify_cache
from logitcache.config.recipe import Component, load_recipe
from logitcache.errors import DataError, RecipeError, RefusedError
from logitcache.report.recipe_check import load_own
from logitcache.runtime.tables import as_text
from logitcache.stage_one.derive.derive import DeriveRecipe, derive
from logitcache.stage_one.precompute import PrecomputeRecipe, precompute
from logitcache.teacher.teacher import TeacherSource
from logitcache.views.datasets import Custom, Dataset


class _Located(Component):
    """Where the images are now, and which functions of the user's own code the views may call."""

    dataset: Dataset | None = None
    factories: tuple[str, ...] = ()


@dataclass(frozen=True)
class VerifyResult:
    """What was compared; `images` is "the same" or "not compared", and `note` says why not; `fix` mends `problems`."""

    cache: str
    shards: int
    bytes: int
    images: str
    note: str | None
    problems: tuple[str, ...]
    fix: str | None

    @property
    def error(self) -> str | None:
        """Say on one line what the problems come to; None without any."""
        count = len(self.problems)
        return f"{self.cache}: {self.note} ({count} problem{'s' * (count > 1)}). Fix: {self.fix}" if count else None


def verify(path: str | Path, overrides: Sequence[str] = (), trust: Collection[str] = ()) -> VerifyResult:
    """Read every stored byte again, and compare the images where they can be found, and the parameters if recorded.

    `overrides` such as `dataset.root=DIR` say where the images are now; without any, images that
    are gone are reported and are no fault of the cache. `trust` has the digests of caches that may name images at
    URLs. Raises MismatchError for other images, pixels or plans, RefusedError for images that are not opened.
    """
    snapshot = open_snapshot(path, fresh=True)
    found = verify_cache(snapshot)
    note, fix = _told(Cache(snapshot), found.problems, overrides, trust)
    images = "the same" if note is None else "not compared"
    return VerifyResult(str(snapshot.store), found.shards, found.bytes, images, note, found.problems, fix)


def verification_text(result: VerifyResult) -> str:
    """Write what was found for human eyes: a table, then a line for every problem; `fix` is told as the error."""
    figures = {name: value for name, value in vars(result).items() if name != "fix"}
    return as_text(figures | {"problems": len(result.problems)}) + "".join(f"{text}\n" for text in result.problems)


def _told(
    cache: Cache, problems: Sequence[str], overrides: Sequence[str], trust: Collection[str]
) -> tuple[str | None, str | None]:
    """Say why images are not compared, None where they are the same, and what mends a cache with problems."""
    if not problems:
        return _compare_images(cache, overrides, trust), None
    if all(problem.endswith("not committed") for problem in problems):
        return "the cache is incomplete", cache.snapshot.fix.removeprefix("Fix: ")
    command = shlex.join(["logitcache", "verify", cache.location, "--repair"])
    return "the cache is damaged", f"run `{command} RECIPE`, which writes just that again"


def repair(
    path: str | Path, recipe: str | Path, overrides: Sequence[str] = (), trust: Collection[str] = ()
) -> VerifyResult:
    """Read every stored byte again, write exactly what is damaged again by the recipe that made the cache, and verify.

    `overrides` change the recipe, of precompute or derive, whose cache to fill is this one. Views, teachers, logits and
    features that it asks for beyond the cache are not added. Raises as these do where the recipe is another one, or
    where the cache cannot be repaired.
    """
    snapshot = open_snapshot(path, fresh=True)
    manifest = snapshot.manifest
    mend = _derive_again if is_derived(manifest) else _precompute_again
    run = mend(recipe, overrides, str(path), manifest)
    # What it finds is remembered: the run need not read every byte once more.
    verify_cache(snapshot)
    run()
    return verify(path, trust=trust)


def _precompute_again(
    recipe: str | Path, overrides: Sequence[str], path: str, manifest: Manifest
) -> Callable[[], object]:
    plan = load_own(recipe, PrecomputeRecipe, overrides)
    views = plan.views.model_copy(update={"num_views": manifest.views.num_views})
    teachers = _kept(plan.teachers, manifest) or plan.teachers
    changes = {"cache": path, "views": views, "teachers": teachers}
    return functools.partial(precompute, plan.model_copy(update=changes))


def _derive_again(recipe: str | Path, overrides: Sequence[str], path: str, manifest: Manifest) -> Callable[[], object]:
    plan = load_own(recipe, DeriveRecipe, overrides)
    changes = {"out": path, "num_views": manifest.views.num_views}
    return functools.partial(derive, plan.model_copy(update=changes))


def _kept(sources: Mapping[str, TeacherSource], manifest: Manifest) -> dict[str, TeacherSource]:
    """Return of the teachers of a recipe what a cache keeps of them."""
    kept = {}
    for name, source in ((name, source) for name, source in sources.items() if name in manifest.teachers):
        entry = manifest.teachers[name]
        features = {feature: value for feature, value in source.features.items() if feature in entry.features}
        logits = None if entry.logits is None else source.logits
        if features or logits is not None:
            kept[name] = source.model_copy(update={"features": features, "logits": logits})
    return kept


def _compare_images(cache: Cache, overrides: Sequence[str], trust: Collection[str]) -> str | None:
    """Return why the images could not be compared, None where they are the same."""
    recorded = cache.manifest.dataset
    theirs = recorded is None or isinstance(recorded, Custom)
    if overrides:
        located = load_recipe({} if theirs else {"dataset": recorded}, _Located, overrides)
        cache.require_parameters(cache.views(located.dataset, factories=located.factories))
        return None
    if theirs:
        return "they came from the user's own code: give --set dataset=…"
    try:
        require_trusted(cache.manifest.views, (), cache.location)
    except RecipeError as error:
        return str(error)
    try:
        cache.require_parameters(cache.views(trust=trust))
    except RefusedError:
        raise
    except (DataError, RecipeError) as error:
        return f"give --set dataset.root=…, or what else says where they are: {str(error).splitlines()[0]}"
    return None
