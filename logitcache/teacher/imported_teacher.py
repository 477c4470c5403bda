"""A recipe of precompute whose teacher is known by its answers in files."""

from collections.abc import Mapping
from typing import Any

from logitcache.config.recipe import load_recipe
from logitcache.errors import RecipeError
from logitcache.models import ImportedAnswers
from logitcache.teacher.precompute_recipe import PrecomputeRecipe


def with_answers(recipe: PrecomputeRecipe, teacher: str | None, entry: Mapping[str, Any]) -> PrecomputeRecipe:
    """Return the recipe with answers in the place of a teacher's model, by default of the only teacher.

    Raises RecipeError without such a teacher, and for a wrong entry.
    """
    names = list(recipe.teachers)
    name = names[0] if teacher is None and len(names) == 1 else teacher
    if name is None:
        raise RecipeError(
            f"the recipe has the teachers {', '.join(names) or '(none)'}. Fix: --teacher NAME, one of them"
        )
    if name not in names:
        raise RecipeError(f"the recipe has no teachers.{name}, but {', '.join(names)}. Fix: --teacher, one of these")
    answers = load_recipe({key: value for key, value in entry.items() if value is not None}, ImportedAnswers)
    source = recipe.teachers[name].model_copy(update={"model": answers})
    return recipe.model_copy(update={"teachers": {**recipe.teachers, name: source}})
