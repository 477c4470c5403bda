"""Keys of recipes, read from the shipped JSON Schemas: their types, defaults and descriptions, without the models.

The schemas are made of the models by docs/generate.py. Reading them takes no torch.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from logitcache.config.shipped_recipes import schema_file
from logitcache.errors import RecipeError, did_you_mean

COMMANDS = ("precompute", "synthesize", "derive", "train-student", "train-teacher", "sweep")
PAGE = "https://github.com/logitcache/logitcache/blob/main/docs/reference/recipes.md"
NAME = "NAME"
"""Stands for a name of the user's own."""
_OWN, _MOST_SKIPPED = 2, 6
"""Levels that may be left out of a key, as in `timm.options`; a name of one's own counts as two, so that kinds win."""

Schema = Mapping[str, Any]


@cache
def read_schema(command: str) -> Schema:
    """Read the JSON Schema of the recipes of a command. Raises RecipeError for an unknown command."""
    if command not in COMMANDS:
        raise RecipeError(
            f"no recipes of kind {command!r}.{did_you_mean(command, COMMANDS)} Fix: name one of {', '.join(COMMANDS)}"
        )
    schema: Schema = json.loads(schema_file(command).read_text())
    return schema


@dataclass(frozen=True)
class Key:
    """A place in the recipes of some commands: its full name, such as `losses.kl_divergence.temperature`."""

    commands: tuple[str, ...]
    path: tuple[str, ...]
    schema: Schema
    definitions: Schema
    title: str = ""

    @property
    def name(self) -> str:
        """The full name; the command if it is the whole recipe."""
        return ".".join(self.path) or self.commands[0]

    @property
    def type(self) -> str:
        """The type and range of its values."""
        return type_text(self.schema, self.definitions)

    @property
    def entries(self) -> Schema:
        """Its own `description`, `default` and `examples`, or else those of its only form; a default is an example."""
        forms = self.forms()
        stated = {**forms[0], **self.schema} if len(forms) == 1 else self.schema
        return {"examples": [stated["default"]], **stated} if stated.get("default") is not None else stated

    def names(self) -> tuple[str, ...]:
        """List the keys or kinds below it; in a list or a map, those of its values."""
        below: dict[str, None] = {}
        for child, _ in self.children():
            own = child.path == self.path or child.path[-1] == NAME
            below |= dict.fromkeys(child.names() if own else child.path[-1:])
        return tuple(below)

    @property
    def link(self) -> str:
        """The address of its section in the documentation."""
        return f"{PAGE}#{self.title.lower().replace(' ', '-')}"

    def forms(self) -> list[Schema]:
        """List the schemas of which its value meets one, without references and null."""
        return list(_forms(self.schema, self.definitions))

    def children(self) -> Iterator[tuple["Key", int]]:
        """Yield all keys and kinds right below, and how many levels of the recipe each is below."""
        forms = self.forms()
        for form in forms:
            kind = _kind(form)
            if kind and len(forms) > 1:
                yield replace(self, path=(*self.path, kind), schema=form, title=form["title"]), 0
            elif form.get("type") == "array" and "items" in form:
                yield replace(self, schema=form["items"]), 0
            else:
                title = form.get("title", self.title)
                for name, schema in form.get("properties", {}).items():
                    yield replace(self, path=(*self.path, name), schema=schema, title=title), 1
                if values := _values(form):
                    yield replace(self, path=(*self.path, NAME), schema=values), 1


def explain(text: str) -> list[Key]:
    """Find the keys of recipes that a dotted name means, levels between its parts left out.

    A part is a key, a kind, the index in a list, or a name of the user's own in a map. Raises RecipeError if there is
    no such key, with the nearest name.
    """
    parts = [part for part in text.strip().split(".") if part]
    commands = parts[:1] if parts and parts[0] in COMMANDS else COMMANDS
    parts = parts[1:] if len(commands) == 1 else parts
    roots = []
    for command in commands:
        schema = read_schema(command)
        roots.append(Key((command,), (), schema, schema["$defs"], command))
    if found := _search(roots, parts):
        return found
    known = next(length for length in range(len(parts) - 1, -1, -1) if _search(roots, parts[:length]))
    names = {child.path[-1] for key in _search(roots, parts[:known]) for child in _below(key, 2)}
    hint = did_you_mean(parts[known], names)
    parent = ".".join(parts[:known])
    raise RecipeError(
        f"{text!r} is no key of a recipe: there is no {parts[known]!r} in {parent or 'any'}.{hint} "
        f"Fix: `{f'logitcache recipe explain {parent}'.strip()}` lists the keys"
    )


def type_text(schema: Schema, definitions: Schema) -> str:
    """Describe the values that a schema allows, in words."""
    if "$ref" in schema:
        target = definitions[schema["$ref"].rpartition("/")[2]]
        return type_text(target, definitions) if "anyOf" in target else _word(target)
    if members := schema.get("oneOf") or schema.get("anyOf"):
        texts = [type_text(member, definitions) for member in members]
        return " or ".join(dict.fromkeys(part for text in texts for part in text.split(" or ")))
    if "const" in schema or "enum" in schema:
        return " or ".join(f"`{json.dumps(one).strip(chr(34))}`" for one in schema.get("enum", [schema.get("const")]))
    match schema.get("type"):
        case "integer" | "number" as number:
            return "".join(["whole number" if number == "integer" else "number", *_range(schema)])
        case "string":
            return "text"
        case "boolean":
            return "`true` or `false`"
        case "null":
            return "`null`"
        case "array" if "prefixItems" in schema:
            return f"[{', '.join(type_text(item, definitions) for item in schema['prefixItems'])}]"
        case "array":
            return f"list of ({type_text(schema['items'], definitions)})"
        case "object" if values := _values(schema):
            return f"map from names to ({type_text(values, definitions)})"
        case "object":
            return _word(schema) if "title" in schema else "map"
    return "any value"


def value_text(value: object) -> str:
    """Write a value as YAML on one line: JSON, without the quotes that words do not need."""
    return re.sub(r'"([A-Za-z][\w./-]*(?::\w+)?)"', r"\1", json.dumps(value, ensure_ascii=False))


def _word(schema: Schema) -> str:
    """Return the first word of a title: `loss` of "Loss kl_divergence"."""
    title: str = schema.get("title", "any value")
    return (title.split()[0] if _kind(schema) else title).lower()


_LIMITS = {
    "minimum": "≥",
    "exclusiveMinimum": ">",
    "maximum": "≤",
    "exclusiveMaximum": "<",
    "multipleOf": "multiple of",
}


def _range(schema: Schema) -> Iterator[str]:
    found = [f"{sign} {schema[name]:g}" for name, sign in _LIMITS.items() if name in schema and abs(schema[name]) < 1e9]
    if found:
        yield f" {' and '.join(found)}"


def _values(schema: Schema) -> Schema | None:
    """Return the schema of the values of a map, None if its keys are known."""
    patterns = [*schema.get("patternProperties", {}).values(), schema.get("additionalProperties")]
    return patterns[0] if isinstance(patterns[0], Mapping) else None


def _kind(schema: Schema) -> str | None:
    kind: str | None = schema.get("properties", {}).get("kind", {}).get("const")
    return kind


def _forms(schema: Schema, definitions: Schema) -> Iterator[Schema]:
    if "$ref" in schema:
        yield from _forms(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    elif members := schema.get("oneOf") or schema.get("anyOf"):
        for member in members:
            yield from _forms(member, definitions)
    elif schema.get("type") != "null":
        yield schema


def _search(roots: Sequence[Key], parts: Sequence[str]) -> list[Key]:
    """Find the keys that the parts mean, with as few levels left out as possible."""
    for skipped in range(_MOST_SKIPPED + 1):
        if found := _merged([key for root in roots for key in _find(root, parts, skipped)]):
            return found
    return []


def _find(key: Key, parts: Sequence[str], skipped: int, named: bool = False) -> Iterator[Key]:
    """Yield the keys below that match the parts with exactly `skipped` levels left out.

    `named`: the key itself is a part, so that the next part may be a name of the user's own.
    """
    if not parts:
        if not skipped:
            yield key
        return
    for child, levels in key.children():
        if child.path == key.path:
            yield from _find(child, parts[1:] if parts[0].isdecimal() else parts, skipped, named)
            continue
        if parts[0] == child.path[-1]:
            yield from _find(child, parts[1:], skipped, True)
        elif named and child.path[-1] == NAME and skipped >= _OWN:
            yield from _find(child, parts[1:], skipped - _OWN, True)
        if skipped >= levels:
            yield from _find(child, parts, skipped - levels)


def _below(key: Key, levels: int) -> Iterator[Key]:
    for child, depth in key.children():
        if child.path != key.path:
            yield child
        if levels > depth or child.path == key.path:
            yield from _below(child, levels - depth)


def _merged(keys: list[Key]) -> list[Key]:
    """Merge equal keys of several commands."""
    found: list[Key] = []
    for key in keys:
        same = next((one for one in found if (one.path, one.schema) == (key.path, key.schema)), None)
        if same is None:
            found.append(key)
        elif key.commands[0] not in same.commands:
            found[found.index(same)] = replace(same, commands=(*same.commands, *key.commands))
    return found
