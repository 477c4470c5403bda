"""The commands that describe the keys of recipes, from the shipped JSON Schemas."""

import json
import shutil
import textwrap
from typing import Annotated, Any

from typer import Argument

from logitcache.cli.common import CommandResult
from logitcache.config.recipe_keys import COMMANDS, Key, explain, read_schema, value_text

_INDENT = " " * 11
_SCHEMA = ("recipe", "schema", "KIND")


def recipe_schema(
    kind: Annotated[
        str,
        Argument(
            metavar="KIND", help=f"The command of the recipes: {', '.join(COMMANDS)}; without one they are listed."
        ),
    ] = "",
) -> CommandResult:
    """Print the JSON Schema of recipes, which editors use to complete and check them."""
    if not kind:
        return CommandResult({"kinds": COMMANDS}, "".join(f"{one}\n" for one in COMMANDS), follows=_SCHEMA)
    schema = read_schema(kind)
    return CommandResult(schema, json.dumps(schema, indent=1, ensure_ascii=False) + "\n")


def recipe_explain(
    key: Annotated[
        str,
        Argument(
            metavar="KEY", help="A key, as in losses.kl_divergence.temperature, or a part of it; without one, all keys."
        ),
    ] = "",
) -> CommandResult:
    """Explain a recipe key: what it does, its type, default and an example."""
    found = explain(key)
    return CommandResult({"keys": [_document(one) for one in found]}, "\n".join(map(_text, found)))


def _document(key: Key) -> dict[str, Any]:
    wanted = ("description", "default", "examples")
    stated = {name: key.entries[name] for name in wanted if name in key.entries}
    return {
        "key": key.name,
        "recipes": key.commands,
        "type": key.type,
        **stated,
        "below": key.names(),
        "link": key.link,
    }


def _text(key: Key) -> str:
    """Describe a key for people, as wide as the terminal."""
    width = min(shutil.get_terminal_size().columns, 120) - 2
    entries = key.entries
    facts = {
        "recipes": ", ".join(key.commands),
        "type": key.type,
        "default": value_text(entries["default"]) if "default" in entries else "",
        "example": " or ".join(f"`{key.path[-1]}: {value_text(one)}`" for one in entries.get("examples", ())),
        "below it": ", ".join(key.names()),
    }
    paragraphs = [textwrap.fill(one, width) for one in entries.get("description", "").split("\n\n")]
    lines = [f"{name + ':':{len(_INDENT)}}{text}" for name, text in facts.items() if text]
    wrapped = [
        textwrap.fill(line, width, subsequent_indent=_INDENT, break_long_words=False, break_on_hyphens=False)
        for line in lines
    ]
    body = "\n".join([*paragraphs, *wrapped, f"{'docs:':{len(_INDENT)}}{key.link}"])
    return f"{key.name}\n{textwrap.indent(body, '  ')}\n"
