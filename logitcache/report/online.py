"""The live teachers of a student's cache, for `--online`."""

from collections.abc import Callable, Mapping

from torch import Tensor

from logitcache.cache.reader import open_cache
from logitcache.device import resolve_device
from logitcache.errors import RecipeError
from logitcache.student.recipes import StudentRecipe
from logitcache.targets import Targets
from logitcache.teacher.models import TeacherSource
from logitcache.teacher.precompute import live_targets


def live_teachers(recipe: StudentRecipe) -> Callable[[Tensor], Mapping[str, Targets]]:
    """Rebuild the teachers that filled the recipe's cache, at the precision they had then.

    Raises RecipeError for a teacher that the cache does not have, MismatchError for other weights.
    """
    cache = open_cache(recipe.cache)
    sources = {}
    for name, teacher in recipe.teachers.items():
        entry = cache.manifest.teachers.get(name)
        if entry is None:
            known = ", ".join(f"'{known}'" for known in cache.manifest.teachers)
            raise RecipeError(f"key 'teachers.{name}': {cache.path} has no such teacher; use {known}")
        sources[name] = TeacherSource(
            model=teacher.model, preprocessing=teacher.preprocessing, precision=entry.precision
        )
    return live_targets(cache, resolve_device(recipe.device), sources)
