"""Turn pydantic's errors into mistakes of a recipe: the key, the fault, and the likely fix."""

import json
import re
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, to_jsonable_python

from logitcache.config.yaml_text import KeyPath, dotted, nearest, show

R = TypeVar("R", bound=BaseModel)

WRONG = {
    "extra_forbidden": "unknown key",
    "union_tag_invalid": "unknown kind",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "string_type": "must be text",
    "bool_type": "must be true or false",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping",
    "model_attributes_type": "must be a mapping",
}
_MOST = 100
"""Mistakes that are described: a file may have a million, each of which is compared with all names."""

_BOOLEANS = dict.fromkeys(("true", "yes", "on", "y"), "true")
_BOOLEANS |= dict.fromkeys(("false", "no", "off", "n"), "false")
_MISSING = ("missing", "union_tag_not_found")
_NOT_A_MAPPING = ("dict_type", "model_type", "model_attributes_type")


def validate(
    data: Any, model: type[R], stand_ins: Mapping[str, object] | None = None
) -> tuple[R | None, list[tuple[KeyPath, str]]]:
    """Validate plain data; returns the object without the wrong entries, and every mistake with its key.

    Of more than a hundred mistakes the others are counted. A misspelt kind is read as the nearest one, so that it hides
    no other mistake. Any other wrong entry is left out, or replaced if `stand_ins` has one of its name: the object is
    None if what is left is none.
    """
    problems: list[tuple[KeyPath, str]] = []
    while True:
        try:
            return model.model_validate_json(json.dumps(data)), problems
        except ValidationError as invalid:
            found = invalid.errors(include_url=False)
            errors = [_Error(error, model, data) for error in found[: _MOST - len(problems)]]
        if len(found) > len(errors):
            more = len(found) - len(errors)
            return None, [*problems, *_merged(errors), ((), f"and {more} more mistakes. Fix: these first")]
        data, corrected = json.loads(json.dumps(data)), False
        for error in errors:
            if error.type == "union_tag_invalid" and error.meant is not None:
                problems.append((error.keys, error.text()))
                _at(data, error.keys[:-1])[error.keys[-1]] = error.meant
                corrected = True
        if not corrected:
            merged = _merged(errors)
            return _without(data, model, [keys for keys, _ in merged], stand_ins or {}), problems + merged


def _without(data: Any, model: type[R], wrong: Sequence[KeyPath], stand_ins: Mapping[str, object]) -> R | None:
    """Validate data without the entries at some keys; None if they are not mappings' or cannot be left out.

    An entry that is wrong without them is left out as a whole.
    """
    while True:
        removed = [_leave_out(data, keys) for keys in wrong]
        left = {**stand_ins, **data} if isinstance(data, dict) else data
        try:
            return model.model_validate_json(json.dumps(left))
        except ValidationError as invalid:
            if not any(removed):
                return None
            wrong = [_Error(error, model, left).keys for error in invalid.errors(include_url=False)]


def _leave_out(data: Any, keys: KeyPath) -> bool:
    """Remove the entry at a key, or the entry that lacks the key; False if that is an item of a list, or everything."""
    for depth in range(len(keys), 0, -1):
        parent, key = _at(data, keys[: depth - 1]), keys[depth - 1]
        if not isinstance(parent, dict):
            return False
        if key in parent:
            del parent[key]
            return True
    return False


def default_at(model: type[BaseModel], data: Any, keys: KeyPath) -> Any:
    """Return the model's default for a key as plain data, or {} if it has none."""
    parents, types = [], _members(model)
    for depth, key in enumerate(keys):
        given = _at(data, keys[:depth])
        kind = given.get("kind") if isinstance(given, dict) else None
        parents = [t for t in types if kind in _kinds(t)] or types
        types = _child(parents, key)
    for parent in filter(_is_model, parents):
        field = parent.model_fields.get(str(keys[-1]))
        if field is not None and not field.is_required():
            value = to_jsonable_python(field.get_default(call_default_factory=True), by_alias=True)
            return {} if value is None else value
    return {}


class _Error:
    """One of pydantic's errors, and the key of the recipe that it is about."""

    def __init__(self, error: ErrorDetails, model: type[BaseModel], data: Any) -> None:
        self.type = error["type"]
        self.message = error["msg"]
        names = [part for part in error["loc"] if part != "[key]"]
        tail = names[-1:] if self.type in ("missing", "extra_forbidden") else []
        keys, types, self.is_alternative = _locate(model, names[: len(names) - len(tail)])
        context = error.get("ctx", {})
        self.least = context.get("min_length")
        if self.type.startswith("union_tag"):
            tail = [str(context["discriminator"]).strip("'")]
        self.keys: KeyPath = (*keys, *tail)
        self.value = _at(data, self.keys)
        self.names = _valid_names(self.type, context, types)
        word = str(tail[0]) if self.type == "extra_forbidden" else self.value
        self.meant = nearest(word, self.names) if isinstance(word, str) else None

    def text(self, *others: "_Error") -> str:
        """Describe the mistake and the likely fix."""
        if self.type in _MISSING:
            return f"key '{dotted(self.keys)}' is missing{self._fix()}"
        wrong = " or ".join(dict.fromkeys(error._wrong() for error in (self, *others)))
        wrong = wrong.replace(" or must be", " or")
        if not self.keys:
            return wrong
        return f"key '{dotted(self.keys)}' = {show(self.value)}: {wrong}{self._fix()}"

    def _wrong(self) -> str:
        if self.type == "too_short":
            return f"give at least {'one' if self.least == 1 else self.least}"
        text = self.message.removeprefix("Value error, ").removeprefix("Assertion failed, ")
        text = text.replace("Input should be", "must be").replace("String should", "must")
        return WRONG.get(self.type, text)

    def _fix(self) -> str:
        if self.meant is not None:
            entry = f"{{kind: {self.meant}}}" if self.type in _NOT_A_MAPPING else f"'{self.meant}'"
            return f"; did you mean {entry}?"
        if self.names and self.type not in ("literal_error", "enum"):
            before = "write {kind: ...} with" if self.type in _NOT_A_MAPPING else "use"
            return f"; {before} one of " + ", ".join(f"'{name}'" for name in self.names)
        return _fix_of_scalar(self.type, self.value)


def _fix_of_scalar(error_type: str, value: Any) -> str:
    """Propose the likely value of the right type."""
    match error_type, value:
        case "bool_type", str() if value.lower() in _BOOLEANS:
            return f"; did you mean {_BOOLEANS[value.lower()]}?"
        case "int_type", float() if value.is_integer():
            return f"; did you mean {value:.0f}?"
        case "int_type", str() if value.isdecimal() and len(value) < 20:
            return f"; did you mean {int(value)}, without quotes?"
        case "string_type", bool() | int() | float():
            return f'; if it is meant as text, quote it: "{show(value)}" (with --set: \'KEY="{show(value)}"\')'
        case "tuple_type", bool() | int() | float() | str():
            return f"; write a list, as in [{show(value)}, …]"
        case "list_type", bool() | int() | float() | str():
            return f"; did you mean [{show(value)}]?"
    return ""


def _merged(errors: list[_Error]) -> list[tuple[KeyPath, str]]:
    """Report each mistake once: not for every member of a union, nor as misspelt and as missing."""
    meant = {(*e.keys[:-1], e.meant) for e in errors if e.type == "extra_forbidden"}
    by_keys: dict[KeyPath, list[_Error]] = {}
    for error in errors:
        deeper = any(
            len(other.keys) > len(error.keys) and other.keys[: len(error.keys)] == error.keys for other in errors
        )
        # An item that is wrong is not counted, so that a list may seem too short because of it.
        if deeper and (error.is_alternative or error.type == "too_short"):
            continue
        if not (error.type in _MISSING and error.keys in meant):
            by_keys.setdefault(error.keys, []).append(error)
    return [(keys, first.text(*others)) for keys, (first, *others) in by_keys.items()]


def _valid_names(error_type: str, context: Mapping[str, Any], types: list[Any]) -> list[str]:
    """List the valid names in the place of a wrong one."""
    models = list(filter(_is_model, types))
    if error_type == "extra_forbidden":
        return [name for t in models for name in t.model_fields]
    if error_type in ("union_tag_not_found", *_NOT_A_MAPPING):
        return [kind for t in models for kind in _kinds(t)]
    expected = str(context.get("expected_tags", context.get("expected", "")))
    return re.findall(r"'([^']*)'", expected)


def _at(data: Any, keys: KeyPath) -> Any:
    """Return the value at a key, None when there is none."""
    for key in keys:
        try:
            data = data[key]
        except (KeyError, IndexError, TypeError):
            return None
    return data


def _locate(model: Any, names: Sequence[str | int]) -> tuple[KeyPath, list[Any], bool]:
    """Turn a location into keys: pydantic's also names the member of each union on the way.

    Returns the keys, the types allowed there, and whether the location ends on such a member.
    """
    keys, types, is_member = KeyPath(), _members(model), False
    for name in names:
        is_member = len(types) > 1
        if is_member:
            label = str(name).partition("[")[0]
            types = [t for found in types if label in _labels(found) for t in _members(found)]
        else:
            keys, types = (*keys, name), _child(types, name)
    return keys, types, is_member


def _members(annotation: Any) -> list[Any]:
    """List the types of a union but None, or the one type."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        members = [member for member in get_args(annotation) if member is not type(None)]
        return members if len(members) > 1 else _members(members[0])
    return [annotation]


def _child(types: list[Any], key: str | int) -> list[Any]:
    """List the types allowed at a field of a model, an index of a list, or a key of a dict."""
    found = []
    for parent in types:
        args = get_args(parent)
        if _is_model(parent):
            field = parent.model_fields.get(str(key))
            found += [] if field is None else _members(field.annotation)
        elif get_origin(parent) is tuple and Ellipsis not in args:
            found += [member for arg in args[int(key) : int(key) + 1] for member in _members(arg)]
        elif args:
            found += _members(args[-1 if isinstance(key, str) else 0])
    return found


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _kinds(annotation: Any) -> tuple[str, ...]:
    """List the values of a component's `kind`."""
    if not _is_model(annotation) or "kind" not in annotation.model_fields:
        return ()
    kind = annotation.model_fields["kind"].annotation
    return get_args(kind) if get_origin(kind) is Literal else ()


def _labels(member: Any) -> tuple[str, ...]:
    """List the words by which pydantic may name a member of a union."""
    if get_origin(member) is Annotated and len(_members(member)) > 1:
        return ("tagged-union", "union")
    origin = get_origin(member) or member
    return (str(getattr(origin, "__name__", origin)), *_kinds(member))


def first_mistake(error: ValidationError) -> str:
    """Return the first mistake in a file that no user writes: its key, and what is wrong there."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'all of it'}: {first['msg']}"
