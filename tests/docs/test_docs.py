"""docs/reference/recipes.md lists every key and kind that a recipe can have."""

import re
import typing
from pathlib import Path

import pytest

from logitcache.config.recipe import Component
from logitcache.report.recipe_check import RECIPES

TEXT = (Path(__file__).parents[2] / "docs" / "reference" / "recipes.md").read_text()
UNFENCED = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)
NAMED = set(re.findall(r"[A-Za-z_0-9]+", " ".join(re.findall(r"`([^`]+)`", UNFENCED))))


def components(annotation: object) -> set[type[Component]]:
    """Find a component and every component that its fields can hold."""
    found = set().union(*(components(part) for part in typing.get_args(annotation)), set())
    if isinstance(annotation, type) and issubclass(annotation, Component):
        found |= {annotation}.union(*(components(field.annotation) for field in annotation.model_fields.values()))
    return found


ALL = sorted(set().union(*(components(recipe) for recipe in RECIPES.values())), key=lambda one: str(one))


@pytest.mark.parametrize("component", ALL, ids=lambda one: f"{one.__module__}.{one.__name__}")
def test_every_key_and_kind_is_listed(component: type[Component]) -> None:
    kind = component.model_fields.get("kind")
    wanted = set(component.model_fields) - {"kind"}
    wanted |= set(typing.get_args(kind.annotation)) if kind else set()
    assert wanted <= NAMED, sorted(wanted - NAMED)
