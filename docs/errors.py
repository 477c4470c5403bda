"""Every error that the package can raise, by its text, from the code: `docs/reference/errors.md`.

What an f-string fills in is shown as `…`.
"""

import ast
import re
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice, product
from pathlib import Path

from logitcache import errors
from logitcache.config.mistakes import WRONG

PACKAGE = Path(errors.__file__).parent
HOLE = "…"
CLASSES = {
    name: found
    for name, found in vars(errors).items()
    if isinstance(found, type) and issubclass(found, errors.LogitCacheError)
}
_RAISING = {"needs_extra": "MissingExtraError"}
"""Functions that take what an error takes, and raise it, by the name of the error."""
_VALIDATORS = ("AfterValidator", "BeforeValidator")
_IMPOSSIBLE = ("idle", "_impossible", "_without_effect")
"""Methods of recipes that return or yield what is wrong with the recipe."""
_CODES = {
    1: "a bug, or a broken connection between processes",
    2: "a recipe, an option, an image or a label",
    3: "a cache is damaged or incomplete, or a storage does not answer",
    4: "the cache is sound and does not match",
    75: "stopped; the same command continues",
}
_DEPTH, _MOST_FORMS = 6, 6


@dataclass(frozen=True, order=True)
class Error:
    """An error: its class ("" for a mistake of a recipe's key), the file that makes it, its line, its text."""

    kind: str
    file: str
    line: int
    text: str

    @property
    def what(self) -> str:
        """The text before its fix."""
        return self.text.partition("Fix: ")[0].rstrip(" .;(\n")

    @property
    def fix(self) -> str:
        """The fix, if the text has one by that name."""
        return self.text.partition("Fix: ")[2].rstrip(" )")

    @property
    def has_words(self) -> bool:
        """Whether it has a text of its own: some pass on that of another error, with the place."""
        return re.search(r"\w", self.what.replace(HOLE, "")) is not None

    @property
    def anchor(self) -> str:
        """The name of its place on the page."""
        words = re.sub(r"[^a-z0-9]+", "-", self.what.lower()).strip("-")
        return f"e-{words[:60].strip('-')}"


class _Module:
    """A file of the package: its functions, and the texts of its constants."""

    def __init__(self, path: Path) -> None:
        self.name = path.relative_to(PACKAGE).as_posix()
        self.tree = ast.parse(path.read_text())
        self.nodes = [*ast.walk(self.tree)]
        self.functions = [node for node in self.nodes if isinstance(node, ast.FunctionDef)]
        self.around = {child: node for node in self.nodes for child in ast.iter_child_nodes(node)}

    def function_of(self, node: ast.AST) -> ast.AST:
        """Return the function around a node, or the module."""
        while node in self.around and not isinstance(node := self.around[node], ast.FunctionDef):
            pass
        return node


@cache
def _modules() -> list[_Module]:
    """Parse the package, once."""
    return [_Module(path) for path in sorted(PACKAGE.rglob("*.py"))]


@cache
def _functions() -> dict[str, ast.FunctionDef]:
    """Return the functions whose names are theirs alone."""
    every = [function for module in _modules() for function in module.functions]
    names = Counter(function.name for function in every)
    return {function.name: function for function in every if names[function.name] == 1}


@cache
def _constants() -> dict[str, ast.expr]:
    """Return what is assigned to the names of modules."""
    return {
        target.id: node.value
        for module in _modules()
        for node in module.tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def texts(node: ast.AST, scope: ast.AST, depth: int = _DEPTH) -> list[str]:
    """Return all texts that an expression of a function can be."""
    if depth == 0:
        return [HOLE]
    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.JoinedStr(values=parts):
            return _joined("", parts, scope, depth)
        case ast.FormattedValue(value=ast.Name() as name):
            return texts(name, scope, depth - 1)
        case ast.Call(func=ast.Attribute(value=ast.Constant(value=str(between)), attr="join"), args=[items]):
            items = items.body if isinstance(items, ast.IfExp) else items
            return _joined(between, items.elts, scope, depth) if isinstance(items, ast.List) else [HOLE]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return ["".join(one) for one in product(texts(left, scope, depth), texts(right, scope, depth))]
        case ast.IfExp(body=body, orelse=other):
            return [*texts(body, scope, depth), *texts(other, scope, depth)]
        case ast.BoolOp(values=values):
            return [text for value in values for text in texts(value, scope, depth)]
        case ast.Name(id=name):
            assigned = [one.value for one in ast.walk(scope) if _assigns(one, name)] or [_constants().get(name)]
            return [text for value in assigned if value is not None for text in texts(value, scope, depth - 1)] or [
                HOLE
            ]
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)) if name in _functions():
            function = _functions()[name]
            found = [one.value for one in ast.walk(function) if isinstance(one, ast.Return) and one.value is not None]
            made = [text for value in found for text in texts(value, function, depth - 1)]
            return [text for text in made if text.replace(HOLE, "").strip()] or [HOLE]
    return [HOLE]


def _joined(between: str, parts: Sequence[ast.AST], scope: ast.AST, depth: int) -> list[str]:
    return [between.join(one) for one in islice(product(*(texts(part, scope, depth) for part in parts)), _MOST_FORMS)]


def _assigns(node: ast.AST, name: str) -> bool:
    match node:
        case ast.Assign(targets=[ast.Name(id=target)]) | ast.AnnAssign(target=ast.Name(id=target)):
            return target == name
        case ast.NamedExpr(target=ast.Name(id=target)):
            return target == name
    return False


@cache
def find_errors() -> list[Error]:
    """Return every error of the package's classes, and every mistake of a recipe's key."""
    found = {
        Error(kind, module.name, node.lineno, _plain(text))
        for module in _modules()
        for kind, node, text in _made(module)
    }
    found |= {Error("", "config/mistakes.py", 0, text) for text in WRONG.values()}
    return sorted(found)


def _made(module: _Module) -> Iterator[tuple[str, ast.expr, str]]:
    validators = _validators(module.nodes)
    for node in module.nodes:
        if not isinstance(node, ast.Call | ast.Yield | ast.Return):
            continue
        scope = module.function_of(node)
        function = getattr(scope, "name", "")
        match node:
            case ast.Call(func=ast.Name(id=name), args=[_, *_] as arguments) if (
                kind := _RAISING.get(name, name)
            ) in CLASSES and function not in _RAISING:
                yield from ((kind, node, text) for text in _message(kind, arguments, scope))
            case ast.Call(func=ast.Attribute(attr="stopped"), args=[_, *_] as arguments):
                yield from (("Stopped", node, text) for text in _message("Stopped", arguments, scope))
            case ast.Call(func=ast.Name(id="ValueError"), args=[argument]) if function in validators:
                yield from (("", node, text) for text in texts(argument, scope))
            case ast.Yield(value=ast.expr() as value) | ast.Return(value=ast.expr() as value) if (
                function in _IMPOSSIBLE
            ):
                yield from (("", value, text) for text in texts(value, scope) if text.replace(HOLE, "").strip())


def _message(name: str, arguments: Sequence[ast.expr], scope: ast.AST) -> Iterator[str]:
    """Yield the texts of an error: of its argument, or of what its class makes of several."""
    shown = {
        "MissingExtraError": "{} needs an optional dependency: pip install 'logitcache[{}]'",
        "RowError": "row {} of a batch: {}",
    }
    values = [texts(argument, scope) for argument in arguments]
    form = shown.get(name, "{}")
    for one in product(*values):
        yield form.format(*one) if name in shown else one[0]


def _validators(nodes: Sequence[ast.AST]) -> set[str]:
    """Return the names of functions that pydantic calls to validate."""
    found = set()
    for node in nodes:
        match node:
            case ast.Call(func=ast.Name(id=name), args=[ast.Name(id=function), *_]) if name in _VALIDATORS:
                found.add(function)
            case ast.FunctionDef(name=function, decorator_list=decorators):
                if any("validator" in ast.unparse(decorator) for decorator in decorators):
                    found.add(function)
    return found


def _plain(text: str) -> str:
    return re.sub(rf"(?:{HOLE}[ ,]*){{2,}}", f"{HOLE} ", " ".join(text.split())).strip()


def errors_page() -> str:
    """Return the page: errors by exit code and folder."""
    found = [error for error in find_errors() if error.has_words]
    parts = [_HEAD]
    for code, meaning in _CODES.items():
        kinds = [name for name, kind in CLASSES.items() if kind.exit_code == code]
        own = [error for error in found if error.kind in kinds]
        if own:
            classes = "\n".join(f"- `{name}`: {_first(CLASSES[name])}" for name in kinds)
            parts += [f"## Exit code {code}: {meaning}", classes, *_by_folder(own)]
    mistakes = [error for error in found if not error.kind]
    parts += ["## Mistakes in a recipe", _MISTAKES, *_by_folder(mistakes)]
    numbers = Counter[str]()

    def unique(match: re.Match[str]) -> str:
        numbers[match[1]] += 1
        return f'id="{match[1]}"' if numbers[match[1]] == 1 else f'id="{match[1]}-{numbers[match[1]]}"'

    return re.sub(r'id="([^"]+)"', unique, "\n\n".join(parts)) + "\n"


_HEAD = """# Errors

Every error that logitcache raises, by its text. Values that an error fills in are shown as `…`: search this page for
the words between them. An error names what is wrong, where, the values, and the fix; `--json` gives its class, message
and exit code. [Exit codes](exit-codes.md) lists what they mean for scripts. This page is made of the code by
`python -m docs.generate`."""

_MISTAKES = """Exit code 2. A mistake follows the file, the line, the key and its value; `logitcache recipe explain`
describes the key. All mistakes of a file are reported at once."""


def _first(kind: type) -> str:
    return (kind.__doc__ or "").partition("\n\n")[0].strip().replace("\n    ", " ")


def _by_folder(found: Sequence[Error]) -> Iterator[str]:
    for folder in sorted({error.file.partition("/")[0] for error in found}):
        own = {error.text: error for error in found if error.file.partition("/")[0] == folder}
        yield f"### In `{folder}`"
        yield "\n".join(_item(own[text]) for text in sorted(own, key=str.lower))


def _item(error: Error) -> str:
    source = ", ".join(filter(None, (error.kind, f"`{error.file}`")))
    lines = _filled(f'- <a id="{error.anchor}"></a>{_code(error.what)} ({source})', "")
    if error.fix:
        lines += ["<br>", *_filled(f"Fix: {_code(error.fix)}", "  ")]
    return "\n".join(lines).replace("\n<br>", "<br>")


def _filled(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text, 116, initial_indent=indent, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def _code(text: str) -> str:
    return f"`` {text} ``" if "`" in text else f"`{text}`"
