"""Parse YAML and `--set` to plain data with the line of each value, and write YAML."""

import difflib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from logitcache.errors import RecipeError

KeyPath = tuple[str | int, ...]


class Place(NamedTuple):
    """The place of a value; `line` sorts, `prefix` begins the message."""

    line: int
    prefix: str


class Mistake(NamedTuple):
    """One line of an error message."""

    place: Place
    text: str


class Loader(yaml.SafeLoader):
    """The plain scalars of YAML 1.2 core: `on` and dates are text, `3e-4` and `010` are numbers."""


class FastLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The same by libyaml, in a twentieth of the time; its errors name other lines."""


class Dumper(yaml.SafeDumper):
    """Quote text that either YAML 1.1 or YAML 1.2 parses as another type."""

    def ignore_aliases(self, data: object) -> bool:
        """Write a value again where it occurs again."""
        return True


Loader.yaml_implicit_resolvers, FastLoader.yaml_implicit_resolvers = {}, {}
_TAG = "tag:yaml.org,2002:"
_FLOAT = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
for _name, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", rf"{_FLOAT}|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+.0123456789"),
):
    for _class in (Loader, FastLoader, Dumper):
        # "" stands for an empty scalar, which only `null` matches.
        _class.add_implicit_resolver(_TAG + _name, re.compile(f"^(?:{_pattern})$"), [*_first, ""])

_AFTER_THE_FILE = 2**31
_MAX_VALUES = 100_000  # aliases of aliases make billions out of a page
_EXPLAINED = 1 << 16  # characters of a text whose mistake is found by the slow loader
_QUOTE = "quote text that holds ': ' or ' #', or begins with one of &*!%@`[]{}"


class RecipeText:
    """A recipe as plain data, the place of each of its values, and the mistakes found so far."""

    def __init__(self, data: Any = None) -> None:
        self.data = data
        self.mistakes: list[Mistake] = []
        self._places: dict[KeyPath, Place] = {(): Place(0, "")}
        self._num_values = 0

    def read(self, path: Path) -> None:
        """Read a file whose top is a mapping. Raises RecipeError."""
        self._places.clear()
        self.data = self._parse(_read_text(path), lambda line: Place(line, f"{path}:{line}: "), ())
        if not isinstance(self.data, dict):
            found = "is empty" if self.data is None else f"is {show(self.data)}, not a mapping"
            raise RecipeError(f"{path}:1: the recipe {found}; write lines such as `name: value`")

    def place(self, keys: KeyPath) -> Place:
        """Find where a key was written, or else the nearest value around it."""
        while keys not in self._places:
            keys = keys[:-1]
        return self._places[keys]

    def override(self, text: str, default: Callable[[KeyPath], Any]) -> None:
        """Apply one `a.b=value`; an absent entry on the way starts from `default(keys)`."""
        place = Place(_AFTER_THE_FILE, f"--set {text}: ")
        key, equals, value = text.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            self.mistakes.append(Mistake(place, "write key=value, such as optimizer.lr=0.1"))
            return
        try:
            data, keys = self._enter(parts, place, default)
            parsed = self._parse(value, lambda line: place, keys)
        except RecipeError as error:
            self.mistakes.append(Mistake(place, str(error).removeprefix(place.prefix)))
            return
        data[keys[-1]] = parsed

    def _enter(self, parts: list[str], place: Place, default: Callable[[KeyPath], Any]) -> tuple[Any, KeyPath]:
        """Walk to the mapping or list that holds the last part; forget the places it replaces."""
        data, keys = self.data, KeyPath()
        for part, after in pairwise(parts):
            keys = (*keys, _step(data, part, keys))
            if isinstance(data, dict) and data.get(part) is None:
                # Another kind has other fields than the default's.
                data[part] = {} if after == "kind" else default(keys)
                self._places[keys] = place
            data = data[keys[-1]]
        keys = (*keys, _step(data, parts[-1], keys))
        self._places = {k: v for k, v in self._places.items() if k[: len(keys)] != keys}
        self._places[keys] = place
        return data, keys

    def _parse(self, text: str, at: Callable[[int], Place], keys: KeyPath) -> Any:
        """Read one YAML document whose top is at `keys`."""
        try:
            node = _node(text)
            return None if node is None else self._value(node, at, keys, ())
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            hint = "indent with spaces" if r"'\t'" in str(error.problem) else _QUOTE
            problem = ", ".join(filter(None, (error.context, error.problem)))
            message = f"{at(line).prefix}not YAML: {problem}; {hint}"
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            message = f"{at(line).prefix}not YAML: a control character; remove it"
        except RecursionError:
            message = f"{at(1).prefix}nested too deeply for a recipe; flatten it"
        raise RecipeError(message)

    def _value(self, node: yaml.Node, at: Callable[[int], Place], keys: KeyPath, around: tuple[yaml.Node, ...]) -> Any:
        """Turn a node into plain data, noting the place of everything in it."""
        place = at(node.start_mark.line + 1)
        self._places.setdefault(keys, place)
        self._num_values += 1
        if node in around or self._num_values > _MAX_VALUES:
            raise RecipeError(f"{place.prefix}aliases (*name) grow without end; write them out")
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node, place)
        if isinstance(node, yaml.SequenceNode):
            items = enumerate(node.value)
            return [self._value(item, at, (*keys, i), (*around, node)) for i, item in items]
        return {
            name: self._value(item, at, (*keys, name), (*around, node)) for name, item in self._entries(node, at, keys)
        }

    def _entries(self, node: yaml.Node, at: Callable[[int], Place], keys: KeyPath) -> Iterator[tuple[str, yaml.Node]]:
        """Yield the entries of a mapping; keys are text, and a key that appears twice a mistake."""
        first: dict[str, int] = {}
        for key, item in node.value:
            place = at(key.start_mark.line + 1)
            if not isinstance(key, yaml.ScalarNode):
                raise RecipeError(f"{place.prefix}a key must be a word, not a list or a mapping")
            name = key.value
            if name in first:
                again = f"key '{dotted((*keys, name))}' appears twice"
                where = f"first on line {first[name]}; remove one"
                self.mistakes.append(Mistake(place, f"{again}, {where}"))
                continue
            first[name] = key.start_mark.line + 1
            self._places[(*keys, name)] = place
            yield name, item


def _node(text: str) -> yaml.Node | None:
    try:
        return FastLoader(text).get_single_node()  # type: ignore[no-any-return]
    except yaml.YAMLError:
        if len(text) > _EXPLAINED:
            raise
    return Loader(text).get_single_node()


def dump(data: Any) -> str:
    """Write plain data as YAML that both YAML 1.1 and YAML 1.2 read alike."""
    text: str = yaml.dump(data, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=100)
    return text


def dump_inline(data: Any) -> str:
    """Write plain data as YAML on one line, as `dump` does."""
    text: str = yaml.dump(
        data, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=math.inf, default_flow_style=True
    )
    return text.removesuffix("\n").removesuffix("\n...")


def flattened(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested maps and lists by dotted key."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not items:
        yield key, value
    for name, item in items:
        yield from flattened(item, f"{key}.{name}" if key else str(name))


def dotted(keys: KeyPath) -> str:
    """Write a key as `--set` takes it."""
    return ".".join(map(str, keys))


def show(value: Any) -> str:
    """Write a value on one short line."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def nearest(word: str, names: Iterable[str]) -> str | None:
    """Find the most similar name, in any case of letters."""
    by_lower = {name.lower(): name for name in names}
    # One wrong letter of two or three leaves little alike.
    cutoff = 0.5 if len(word) < 4 else 0.6
    found = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=cutoff)
    return by_lower[found[0]] if found else None


def _read_text(path: Path) -> str:
    """Read UTF-8 text, with or without a byte order mark. Raises RecipeError."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(f"{path}: there is no such file. Fix: {_hint(path)}") from None
    except IsADirectoryError:
        names = ", ".join(sorted(p.name for p in path.glob("*.y*ml"))) or "it holds none"
        raise RecipeError(f"{path}: is a folder; name a recipe in it ({names})") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{path}:{line}: not UTF-8; save the file as UTF-8 text") from None
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}; name a file that can be read") from None


def _hint(path: Path) -> str:
    """Guess the file that a wrong path means."""
    bare = Path(str(path).strip("'\""))
    if bare != path:
        return f"write {bare}: the quotes are taken as part of its name"
    # Endings are alike in all names.
    stems = {p.stem: p for p in path.parent.glob("*.y*ml")}
    near = nearest(path.stem, stems)
    return f"did you mean '{stems[near]}'?" if near else "name a YAML file"


def _scalar(node: yaml.ScalarNode, place: Place) -> Any:
    """Convert as YAML 1.2 core does. Raises RecipeError for other tags and impossible numbers."""
    text: str = node.value
    try:
        match node.tag.removeprefix(_TAG):
            case "str":
                return text
            case "null":
                return None
            case "bool":
                return text.lower() == "true"
            case "int":
                return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
            case "float":
                return float(re.sub(r"\.(?=[in])", "", text.lower()))
    except ValueError:
        raise RecipeError(f"{place.prefix}{text[:20]} cannot be read as a number") from None
    raise RecipeError(f"{place.prefix}the tag {node.tag} has no place in a recipe; remove it")


def _step(data: Any, part: str, keys: KeyPath) -> str | int:
    """Resolve one part of a dotted key in a mapping or a list. Raises RecipeError."""
    if isinstance(data, dict):
        return part
    if not isinstance(data, list):
        raise RecipeError(f"'{dotted(keys)}' is {show(data)}, which has no key '{part}'")
    if not part.isdecimal() or int(part) >= len(data):
        entries = f"0 to {len(data) - 1}" if data else "none"
        raise RecipeError(f"'{dotted(keys)}' is a list with entries {entries}, not '{part}'")
    return int(part)
