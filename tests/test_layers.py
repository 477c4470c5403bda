"""Imports point down, as `BELOW` lists: from cli to report, and from student to cache, to views and all others."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "logitcache"
BELOW = {
    "views": (),
    "cache": ("views",),
    "teacher": ("cache",),
    "stage_one": ("teacher",),
    "planning": ("stage_one",),
    "student": ("cache",),
    "sweeps": ("stage_one", "student"),
    "shipping": ("student",),
    "report": ("planning", "sweeps", "shipping"),
    "cli": ("report",),
}
"""What lies right below each folder; all other folders and modules are at the bottom."""
# They name the public objects and the command line, lazily.
ENTRANCES = {"logitcache", "logitcache.__main__"}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.AST, importer: str, is_package: bool) -> Iterator[str]:
    """Name all that a module imports of the package: in functions and for type checkers too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = importer.split(".")
                kept = len(parents) - node.level + is_package
                base = ".".join([*parents[:kept], *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (a.value for a in node.args if isinstance(a, ast.Constant))
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "logitcache":
            yield f"logitcache.{node.attr}"


def unit(name: str) -> str:
    """Return the second part of a dotted name: the package's folder or its top module."""
    return [*name.split("."), ""][1]


def reached(folder: str) -> set[str]:
    """Return a folder and all that lies below it."""
    return {folder}.union(*map(reached, BELOW.get(folder, ())))


def violations(source: str, importer: str, is_package: bool = False) -> list[str]:
    own = unit(importer)
    below = reached(own)
    found = []
    for name in imported(ast.parse(source), importer, is_package):
        other = unit(name)
        if name.split(".")[0] != "logitcache" or not other or other.startswith("__"):
            continue
        forbidden = other in BELOW and other not in below
        exists = any((PACKAGE / part).exists() for part in (other, f"{other}.py"))
        if forbidden or (not exists and own != "cli"):
            found.append(f"{importer} imports {name}")
    return found


def test_imports_point_down() -> None:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = module_name(path)
        if name not in ENTRANCES:
            found += violations(path.read_text(), name, path.name == "__init__.py")
    assert not found, "\n".join(found)


def test_files_have_300_lines_at_most_and_functions_60() -> None:
    sources = {path: path.read_text() for path in PACKAGE.rglob("*.py")}
    functions = (
        (path.name, node.name, 1 + (node.end_lineno or 0) - node.lineno)
        for path, source in sources.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    assert not [path.name for path, source in sources.items() if len(source.splitlines()) > 300]
    assert not [found for found in functions if found[2] > 60]


def test_errors_import_nothing_of_the_package() -> None:
    tree = ast.parse((PACKAGE / "errors.py").read_text())
    assert not [n for n in imported(tree, "logitcache.errors", False) if "logitcache" in n]


def test_every_folder_has_a_layer() -> None:
    base_packages = {"config", "data", "models", "runtime", "store"}
    folders = {p.parent.name for p in PACKAGE.glob("*/__init__.py")}
    assert folders - base_packages == set(BELOW)


@pytest.mark.parametrize(
    ("importer", "line"),
    [
        ("logitcache.stage_one.precompute", "from logitcache.student import training"),
        ("logitcache.stage_one.precompute", "import logitcache.student.training as t"),
        ("logitcache.student.training", "from ..teacher import precompute"),
        ("logitcache.views.spec", "def f():\n    from logitcache.cache import reader"),
        ("logitcache.config.recipe", "if TYPE_CHECKING:\n    from logitcache.views import spec"),
        ("logitcache.views.keys", "importlib.import_module('logitcache.report.demo.demo')"),
        ("logitcache.report.demo.demo", "from logitcache import open_cache"),
        ("logitcache.report.demo.demo", "import logitcache\nlogitcache.open_cache('a')"),
    ],
)
def test_an_import_that_points_up_or_sideways_is_found(importer: str, line: str) -> None:
    assert violations(line, importer)


@pytest.mark.parametrize(
    ("importer", "line"),
    [
        ("logitcache.stage_one.precompute", "from logitcache.cache.write.writer import CacheWriter"),
        ("logitcache.cli.app", "from logitcache.report import demo"),
        ("logitcache.cache.cache", "from . import manifest"),
        ("logitcache.models.stored", "from logitcache.errors import RecipeError"),
        ("logitcache.report.environment", "from logitcache import __version__"),
        ("logitcache.report.environment", "import logitcache\nprint(logitcache.__file__)"),
        ("logitcache.cli.commands", "from logitcache import open_cache"),
    ],
)
def test_an_import_that_points_down_is_let_through(importer: str, line: str) -> None:
    assert not violations(line, importer)
