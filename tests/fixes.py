"""Carry out what an error prints behind `Fix: `: entries of a recipe, and Python expressions."""

import ast
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

_CLOSING = {"{": "}", "[": "]"}


def fix_of(error: object) -> str:
    """Return the text behind the first `Fix: ` of an error, in one line; fails if there is none."""
    _, found, fix = str(error).partition("Fix: ")
    assert found, error
    return " ".join(fix.split())


def listed(error: object) -> list[Any]:
    """Return the last list that an error prints, as in `the cache has ['a', 'b']`."""
    values: list[Any] = ast.literal_eval(re.findall(r"\[.*?\]", str(error))[-1])
    return values


def entries(fix: str) -> list[tuple[str, Any]]:
    """Return the entries `a.b: VALUE` that a text holds, in order."""
    return list(_entries(fix))


def applied(recipe: Mapping[str, Any], *found: tuple[str, Any]) -> dict[str, Any]:
    """Return a recipe with entries set; those of mappings are merged."""
    changed = dict(recipe)
    for path, value in found:
        first, _, rest = path.partition(".")
        inner = {rest: value} if rest else value
        old = changed.get(first) or {}
        changed[first] = applied(old, *inner.items()) if isinstance(inner, dict) else inner
    return changed


def called(fix: str, **names: Any) -> Any:
    """Evaluate the first call `f(…)` in a text, with these names."""
    return eval(_first_call(fix), names)


def keywords(fix: str) -> dict[str, Any]:
    """Return the arguments `name=literal` in a text."""
    return {name: ast.literal_eval(value) for name, value in re.findall(r"\b(\w+)=(True|False|\d+)", fix)}


def _entries(text: str) -> Iterator[tuple[str, Any]]:
    at = 0
    while (key := re.compile(r"\b([A-Za-z_][\w.-]*): (?=\S)(?![\w.]+: )").search(text, at)) is not None:
        at = key.end() + _length(text[key.end() :])
        yield key[1], yaml.safe_load(text[key.end() : at])


def _length(text: str) -> int:
    """Return how many characters a value takes: up to its closing bracket, or of a word."""
    closing = _CLOSING.get(text[0])
    if closing is None:
        return len(re.match(r"[^\s,;`)]+", text)[0].rstrip("."))  # type: ignore[index]
    depth = 0
    for position, character in enumerate(text):
        depth += (character == text[0]) - (character == closing)
        if not depth:
            return position + 1
    raise AssertionError(f"unclosed: {text}")


def _first_call(text: str) -> str:
    for start in re.finditer(r"\b[A-Za-z_][\w.]*\(", text):
        for end in (found.end() for found in re.finditer(r"\)", text[start.start() :])):
            expression = text[start.start() :][:end]
            try:
                parsed = ast.parse(expression, mode="eval").body
            except SyntaxError:
                continue
            if isinstance(parsed, ast.Call):
                return expression
    raise AssertionError(f"no call in: {text}")
