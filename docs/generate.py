"""Write what a computer can write of the models and the code: `python -m docs.generate`.

pipelines/schemas/KIND.json         the JSON Schema of the recipes of each command
docs/reference/recipes.md           the blocks between `<!-- keys of … -->` and `<!-- end -->`
docs/reference/errors.md            every error, by docs/errors.py
"""

import json
import re
import textwrap
from functools import cache
from pathlib import Path
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from docs.errors import errors_page
from logitcache.config.recipe import Component
from logitcache.config.recipe_keys import type_text, value_text
from logitcache.report.recipe_check import RECIPES

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/reference/recipes.md"
WORDS = {
    "logitcache.views.datasets": "Dataset",
    "logitcache.views.augmentations": "Augmentation",
    "logitcache.views.mixing.mixing": "Mixing",
    "logitcache.views.sampling": "Sampling",
    "logitcache.models": "Model",
    "logitcache.cache.encodings": "Encoding",
    "logitcache.student.losses.temperatures": "Schedule",
    "logitcache.student.losses": "Loss",
    "logitcache.student.optim.schedules": "Schedule",
    "logitcache.student.optim.optimizers": "Optimizer",
    "logitcache.student.ensembles": "Ensemble",
    "logitcache.student.trackers": "Tracker",
    "logitcache.sweeps.search.space": "Range",
    "logitcache.sweeps.search.search_recipe": "Search",
}
"""The first word of the title of a model with a `kind`, by the start of its module."""


_ANCHORS = {
    "learning rate schedule": "learning-rate-schedule",
    "teacher source": "teacher-source",
    "live teacher": "live-teacher",
    "derived teacher": "derived-teacher",
    "synthesis teacher": "synthesis-teacher",
    "synthesis losses": "synthesis-losses",
    "class groups": "class-groups",
    "drift limits": "drift-limits",
    "view spec": "view-spec",
    "preprocessing": "preprocessing",
    "feature": "feature",
    "validation": "validation",
    "ema": "ema",
    **{
        word: f"{word}s"
        for word in ("augmentation", "model", "encoding", "schedule", "optimizer", "ensemble", "tracker")
    },
    **{"dataset": "data-sets", "loss": "losses", "mixing": "mixing", "sampling": "sampling"},
    **{"range": "ranges", "search": "searches", "finalists": "finalists", "halving": "halving", "timing": "timing"},
    "variant": "variant",
}
"""The section of each word of a type."""


class _Untitled(GenerateJsonSchema):
    """Give no titles to fields, which would repeat their names."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def title_of(model: type[Component]) -> str:
    """Return the title of a model: `Loss kl_divergence`, `View spec`, or the command of a recipe."""
    for command, recipe in RECIPES.items():
        if model is recipe:
            return command
    kind = model.model_fields["kind"].default if "kind" in model.model_fields else None
    if isinstance(kind, str):
        word = next(word for start, word in WORDS.items() if model.__module__.startswith(start))
        return f"{word} {kind}"
    return re.sub(r"(?<=[a-z])[A-Z]", lambda capital: f" {capital[0].lower()}", model.__name__)


def models_of(annotation: Any) -> set[type[Component]]:
    """Return a model and every model that its fields can hold, or all of a type."""
    found = set().union(*(models_of(part) for part in getattr(annotation, "__args__", ())), set())
    if isinstance(annotation, type) and issubclass(annotation, Component):
        found |= {annotation}.union(*(models_of(field.annotation) for field in annotation.model_fields.values()))
    return found


@cache
def schema_of(command: str) -> dict[str, Any]:
    """Return the JSON Schema of the recipes of a command, definitions named by their titles."""
    schema = RECIPES[command].model_json_schema(schema_generator=_Untitled)
    models = {model.__name__: model for model in models_of(RECIPES[command])}
    models |= {f"{m.__module__}.{m.__name__}".replace(".", "__"): m for m in models_of(RECIPES[command])}
    definitions = schema.pop("$defs")
    names = {name: title_of(models[name]).replace(" ", "_") for name in definitions if name in models}
    for name, entries in definitions.items():
        if name in models:
            _describe(entries, models[name])
    _describe(schema, RECIPES[command])
    schema["$defs"] = {names.get(name, name): entries for name, entries in definitions.items()}
    found: dict[str, Any] = _tidy(schema, names)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found}


def _describe(entries: dict[str, Any], model: type[Component]) -> None:
    form = entries["anyOf"][-1] if "anyOf" in entries else entries
    form["title"] = entries["title"] = title_of(model)
    form["description"] = "\n\n".join(" ".join(text.split()) for text in form["description"].split("\n\n"))
    kind = form["properties"].get("kind", {})
    if "const" in kind:
        kind["description"] = form["description"].partition("\n\n")[0]
        form["required"] = ["kind", *form.get("required", ())]


def _tidy(value: Any, names: dict[str, str]) -> Any:
    """Leave out a keyword that JSON Schema does not have; point references at the new names."""
    if isinstance(value, list):
        return [_tidy(item, names) for item in value]
    if not isinstance(value, dict):
        return value
    found = {key: _tidy(item, names) for key, item in value.items() if key != "discriminator"}
    if "patternProperties" in found:
        found["additionalProperties"] = False
    if isinstance(reference := found.get("$ref"), str):
        name = reference.rpartition("/")[2]
        found["$ref"] = f"#/$defs/{names.get(name, name)}"
    return found


def keys_of(name: str) -> str:
    """Describe the models whose titles are a name, `View spec`, or begin with it and end with their kind, `Loss`."""
    parts: dict[str, tuple[Any, Any]] = {}
    for schema in map(schema_of, RECIPES):
        for part in (schema, *schema["$defs"].values()):
            title = part.get("title", "")
            if title == name or (title.startswith(f"{name} ") and name in WORDS.values()):
                parts[title] = (part["anyOf"][-1] if "anyOf" in part else part, schema["$defs"])
    assert parts, name
    return "\n".join(_section(title, *parts[title]) for title in sorted(parts))


def _section(title: str, schema: Any, definitions: Any) -> str:
    word, _, kind = title.partition(" ")
    heading = f"### {word} `{kind}`" if word in WORDS.values() else f"### {title}"
    texts = [] if title in RECIPES else [heading]
    texts += [_filled(paragraph) for paragraph in schema["description"].split("\n\n")]
    keys = ((name, key) for name, key in schema["properties"].items() if name != "kind" or "enum" in key)
    items = [_item(name, key, schema.get("required", ()), definitions) for name, key in keys]
    return "\n\n".join([*texts, *(["\n".join(items)] if items else [])]) + "\n"


def _item(name: str, key: Any, required: Any, definitions: Any) -> str:
    default = key.get("default")
    stated = (
        f", `{value_text(default)}` by default" if default is not None else "" if "default" in key else ", required"
    )
    stated = "" if name in ("plan_version", "torchvision_version") else stated
    kinds = _linked(type_text(key, definitions).replace(" or `null`", "" if default is None else " or `null`"))
    return _filled(f"- `{name}` ({kinds}{stated}): {key['description']}", "  ")


def _linked(text: str) -> str:
    """Link the words of a type to their sections."""
    for words, anchor in _ANCHORS.items():
        text = re.sub(rf"(?<![\w`#[-]){words}(?![\w`\]-])", f"[{words}](#{anchor})", text)
    return text


def _filled(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 118, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def page() -> str:
    """Return the page of recipe keys, its blocks made anew."""
    block = r"(<!-- keys of ([\w -]+) -->\n).*?(<!-- end -->)"
    return re.sub(block, lambda m: f"{m[1]}\n{keys_of(m[2])}\n{m[3]}", PAGE.read_text(), flags=re.DOTALL)


def files() -> dict[Path, str]:
    """Return all that is generated, by file."""
    found = {PAGE: page(), ROOT / "docs/reference/errors.md": errors_page()}
    for command in RECIPES:
        text = json.dumps(schema_of(command), indent=1, ensure_ascii=False)
        found[ROOT / f"pipelines/schemas/{command}.json"] = f"{text}\n"
    return found


def main() -> None:
    """Write the files that differ."""
    for file, text in files().items():
        file.parent.mkdir(exist_ok=True)
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
            print(file.relative_to(ROOT))


if __name__ == "__main__":
    main()
