"""docs/reference/recipes.md lists each key in the section of its model; keys that other pages name exist."""

import re
from pathlib import Path

import pytest
import yaml

from logitcache.config.recipe import Component
from logitcache.config.recipe_keys import COMMANDS, explain, read_schema
from logitcache.errors import RecipeError
from logitcache.report.recipe_check import RECIPES
from tests.docs.test_recipe_keys import MODELS, fields_of, generate

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXT = (ROOT / "docs/reference/recipes.md").read_text()
FILE_SUFFIXES = (".csv", ".json", ".jsonl", ".pt", ".safetensors", ".yaml")
TOP_KEYS = frozenset().union(*(recipe.model_fields for recipe in RECIPES.values()))
FORMS = [
    form
    for schema in map(read_schema, COMMANDS)
    for part in schema["$defs"].values()
    for form in (part, *part.get("anyOf", ()))
    if "kind" in form.get("properties", {})
]
"""The JSON Schemas of all models that have a kind."""


@pytest.mark.parametrize("model", MODELS, ids=generate.title_of)
def test_every_key_is_in_the_section_of_its_model(model: type[Component]) -> None:
    title = generate.title_of(model)
    word, _, kind = title.partition(" ")
    heading = f"### {word} `{kind}`" if f"### {word} `{kind}`" in TEXT else f"### {title}"
    section = TEXT.partition(f"<!-- keys of {title} -->\n" if model in RECIPES.values() else f"\n{heading}\n\n")[2]
    listed = set(re.findall(r"^- `(\w+)` \(", re.split(r"\n### |<!-- end", section)[0], re.MULTILINE))
    assert listed == {name for name, _ in fields_of(model)}


def spans(page: Path) -> list[str]:
    """List the texts in backticks, outside of examples."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL))


def is_key(text: str) -> bool:
    try:
        return bool(explain(text))
    except RecipeError:
        return False


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "format.md"], ids=lambda page: page.name)
def test_keys_that_a_page_names_exist_where_it_names_them(page: Path) -> None:
    named = [text for text in spans(page) if re.fullmatch(r"[a-z_]+(?:\.\w+)+", text)]
    named = [text for text in named if text.partition(".")[0] in TOP_KEYS and not text.endswith(FILE_SUFFIXES)]
    assert [text for text in named if not is_key(text)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_entries_that_a_page_shows_have_keys_of_their_kind(page: Path) -> None:
    for text in re.findall(r"\{kind: [^{}]*\}", page.read_text()):
        if "…" in text:
            continue
        entry = yaml.safe_load(text)
        forms = [form["properties"] for form in FORMS if entry["kind"] in allowed(form["properties"]["kind"])]
        assert any(entry.keys() <= form.keys() for form in forms), text


def allowed(kind: dict[str, object]) -> list[object]:
    """List the values that a schema of `kind` allows."""
    values = kind.get("enum", [kind.get("const")])
    assert isinstance(values, list)
    return values


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name not in ("errors.md", "format.md")], ids=lambda page: page.name
)
def test_no_line_outside_of_examples_and_tables_is_long(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    assert [line for line in text.splitlines() if len(line) > 120 and not line.startswith("|")] == []
