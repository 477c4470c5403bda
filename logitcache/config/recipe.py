"""Recipes: YAML and `--set` in, validated frozen objects out, every mistake reported at once."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
)
from pydantic_core import PydanticSerializationError, to_jsonable_python

from logitcache.config.mistakes import default_at, validate
from logitcache.config.yaml_text import Mistake, RecipeText, dump
from logitcache.errors import RecipeError, listed


def _lenient_float(value: object) -> object:
    """Read '3e-4' in quotes as a number; leave anything else to the validation."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


class Component(BaseModel):
    """A frozen value whose fields are its recipe entry and its stored form.

    Unknown fields are rejected, strings stay strings, and booleans are never numbers.
    """

    stand_ins: ClassVar[dict[str, object]] = {}
    """Values of required fields for a check of everything else, if an entry is missing or wrong."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def idle(self, epochs: float) -> str | None:
        """Return why the component has no effect in a run of so many epochs, and the fix; None if it has one."""
        return None


class Extended(Component):
    """A component to which fields were added after its first release.

    Added fields that hold their default are left out of the stored form: digests of older files stay the same.
    """

    added: ClassVar[frozenset[str]]

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        stored: dict[str, Any] = handler(self)
        fields = type(self).model_fields
        unset = {name for name in self.added if getattr(self, name) == fields[name].default}
        return {name: value for name, value in stored.items() if name not in unset}


def or_a_number(schema: dict[str, Any]) -> None:
    """Let the JSON Schema of a component take a plain number, which its validator reads as the component."""
    entries = dict(schema)
    schema.clear()
    schema.update(title=entries.pop("title"), anyOf=[{"type": "number"}, entries])


Lenient = BeforeValidator(_lenient_float)
"""Goes after the limits of a number: JSON Schema would not get those that come after it."""

Float = Annotated[float, Lenient]
Fraction = Annotated[float, Field(ge=0.0, le=1.0), Lenient]
Positive = Annotated[float, Field(gt=0.0), Lenient]
Count = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=64)]

NEVER_APPLIED = "has p: 0 and is never applied. Fix: leave it out, or raise p"

NOWHERE = "/dev/null/none"
"""A path at which nothing can be."""

R = TypeVar("R", bound=BaseModel)


def load_recipe(source: str | Path | Mapping[str, Any], model: type[R], overrides: Sequence[str] = ()) -> R:
    """Read a YAML file or a mapping, apply `a.b=c` overrides, and validate it as `model`.

    Raises RecipeError that lists every mistake with its line (or `--set`), key, value and fix.
    """
    accepted, mistakes = load_sound(source, model, overrides)
    if accepted is None or mistakes:
        raise RecipeError(listed(mistakes))
    return accepted


def load_sound(
    source: str | Path | Mapping[str, Any], model: type[R], overrides: Sequence[str] = ()
) -> tuple[R | None, list[str]]:
    """Read a recipe as `load_recipe` does; return it without the entries that are wrong, and every mistake.

    Missing and wrong entries are those of `stand_ins`. None if what is left is no recipe.
    """
    recipe = _read(source)
    for text in overrides:
        recipe.override(text, lambda keys: default_at(model, recipe.data, keys))
    sound, problems = validate(recipe.data, model, getattr(model, "stand_ins", {}))
    return sound, _worded(recipe.mistakes + [Mistake(recipe.place(keys), text) for keys, text in problems])


def read_recipe(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """Read a YAML file or a mapping as plain data, not validated. Raises RecipeError."""
    recipe = _read(source)
    if recipe.mistakes:
        raise RecipeError(listed(_worded(recipe.mistakes)))
    data: dict[str, Any] = recipe.data
    return data


def require_effect(recipe: Component, epochs: float = math.inf) -> None:
    """Raise RecipeError listing every part of a recipe that has no effect, by its key.

    For new caches and runs only: one that was begun with such a part continues.
    """
    lines = list(_idle(recipe, epochs, ()))
    if lines:
        raise RecipeError("\n  ".join([f"{len(lines)} options without effect:", *lines] if len(lines) > 1 else lines))


def _idle(value: object, epochs: float, keys: tuple[object, ...]) -> Iterator[str]:
    if isinstance(value, Component):
        reason = value.idle(epochs)
        if reason is not None:
            yield f"{'.'.join(map(str, keys)) or 'the recipe'} {reason}"
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, tuple) else ()
    for key, item in value if isinstance(value, Component) else items:
        yield from _idle(item, epochs, (*keys, key))


def dump_recipe(recipe: BaseModel) -> str:
    """Write a recipe as YAML that `load_recipe` reads back to an equal object."""
    return dump(recipe.model_dump(mode="json", by_alias=True))


def is_stated(key: str, overrides: Sequence[str]) -> bool:
    """Return whether the user sets a key, or one that holds it."""
    parts = key.split(".")
    above = {".".join(parts[:count]) for count in range(1, len(parts) + 1)}
    return any(text.partition("=")[0] in above for text in overrides)


def _read(source: str | Path | Mapping[str, Any]) -> RecipeText:
    if not isinstance(source, Mapping):
        recipe = RecipeText()
        recipe.read(Path(source))
        return recipe
    try:
        return RecipeText(to_jsonable_python(dict(source), by_alias=True))
    except PydanticSerializationError as error:
        raise RecipeError(f"the recipe holds a value that YAML has not: {error}; use plain values") from None


def _worded(mistakes: Iterable[Mistake]) -> list[str]:
    return [f"{place.prefix}{text}" for place, text in sorted(mistakes)]
