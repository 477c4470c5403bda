"""Keys of recipes describe themselves; schemas and pages that are made of them are up to date."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic.fields import FieldInfo

from docs import generate
from logitcache.config.recipe import Component, load_recipe, read_recipe
from logitcache.errors import RecipeError
from logitcache.report.recipe_check import RECIPES, command_of

ROOT = Path(__file__).parents[2]
MODELS = sorted(set().union(*map(generate.models_of, RECIPES.values())), key=generate.title_of)
RECIPE_FILES = sorted((ROOT / "pipelines").rglob("*.yaml"))
SCHEMAS = {
    command: json.loads((ROOT / f"pipelines/schemas/{command}.json").read_text(encoding="utf-8")) for command in RECIPES
}


def fields_of(model: type[Component]) -> Iterator[tuple[str, FieldInfo]]:
    """Yield the keys of a model but its only kind, which the model's docstring describes."""
    for name, field in model.model_fields.items():
        if name != "kind" or field.is_required():
            yield name, field


@pytest.mark.parametrize("model", MODELS, ids=generate.title_of)
def test_every_key_has_a_description_and_an_example(model: type[Component]) -> None:
    assert model.__doc__
    for name, field in fields_of(model):
        assert field.description, name
        assert field.description.endswith("."), name
        assert field.examples or field.get_default(call_default_factory=True, validated_data={}) is not None, name


def test_generated_files_are_up_to_date() -> None:
    old = [file for file, text in generate.files().items() if not file.exists() or file.read_text() != text]
    assert old == [], "run: python -m docs.generate"


@pytest.mark.parametrize("command", RECIPES)
def test_schemas_are_json_schemas_of_their_draft(command: str) -> None:
    schema = SCHEMAS[command]
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["title"] == command
    jsonschema.Draft202012Validator.check_schema(schema)


def problems(command: str, entries: Any) -> list[str]:
    validator = jsonschema.Draft202012Validator(SCHEMAS[command])
    return [error.message for error in validator.iter_errors(entries)]


@pytest.mark.parametrize("path", RECIPE_FILES, ids=lambda path: str(path.relative_to(ROOT / "pipelines")))
def test_shipped_recipes_meet_the_schema_that_they_name(path: Path) -> None:
    named = re.match(r"# yaml-language-server: \$schema=(\S+)\n", path.read_text())
    assert named is not None
    assert (path.parent / named[1]).resolve() == ROOT / f"pipelines/schemas/{command_of(path)}.json"
    assert problems(command_of(path), read_recipe(path)) == []


def test_every_example_and_default_of_a_key_meets_its_schema() -> None:
    for schema in SCHEMAS.values():
        for part in (schema, *schema["$defs"].values()):
            form = part["anyOf"][-1] if "anyOf" in part else part
            for name, key in form.get("properties", {}).items():
                assert key.get("description"), (part["title"], name)
                shown = [*key.get("examples", ()), *([key["default"]] if "default" in key else [])]
                validator = jsonschema.Draft202012Validator({"$defs": schema["$defs"], **key})
                for value in shown:
                    assert list(validator.iter_errors(value)) == [], (part["title"], name)


STUDENT = {"out": "r", "cache": "c", "epochs": 1, "model": {"kind": "small_cnn"}}
MISTAKES = {
    "an unknown key": {"epoch": 3},
    "a missing key": {"cache": None},
    "an unknown kind": {"model": {"kind": "small_cn"}},
    "a kind that is missing": {"model": {"width": 8}},
    "a key of another kind": {"optimizer": {"kind": "adamw", "momentum": 0.9}},
    "a number out of range": {"optimizer": {"kind": "sgd", "lr": 0}},
    "a number below the least": {"batch_size": 0},
    "text for a number": {"epochs": "many"},
    "a boolean for a number": {"epochs": True},
    "a word that is none of the choices": {"precision": "float8"},
    "an empty list": {"losses": []},
    "a wrong item of a list": {"losses": [{"kind": "kl_divergence", "temperature": "hot"}]},
    "a name that is no name": {"ensembles": {"a b": {"kind": "mean"}}},
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_schema_finds_the_mistakes_that_we_find(mistake: str) -> None:
    entries = {key: value for key, value in (STUDENT | MISTAKES[mistake]).items() if value is not None}
    assert problems("train-student", STUDENT) == []
    with pytest.raises(RecipeError):
        load_recipe(entries, RECIPES["train-student"])
    assert problems("train-student", entries) != []


def test_short_forms_meet_the_schema() -> None:
    entries = yaml.safe_load(
        """
        {losses: [{kind: kl_divergence, temperature: 4}, {kind: dkd, weight: {kind: warm_up, value: 1, epochs: 1}}],
         ema: 0.999, trust: "%s"}"""
        % ("0" * 64)
    )
    load_recipe(STUDENT | entries, RECIPES["train-student"])
    assert problems("train-student", STUDENT | entries) == []
