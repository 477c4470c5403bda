"""docs/reference/errors.md has every error that the package can raise, and no other."""

import ast
import re
from pathlib import Path

import pytest

from docs.errors import CLASSES, HOLE, Error, errors_page, find_errors
from logitcache import errors
from logitcache.cli.app import main

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "logitcache"
PAGE = (ROOT / "docs/reference/errors.md").read_text()
FLAT = " ".join(PAGE.replace("`` ", "`").replace(" ``", "`").split())

PASSING_ON = {"…", "…: …", "…/…: …", "…: …. …", "…: … (…/…)"}
"""Errors whose text is that of another error, with the place."""


def test_the_page_is_up_to_date() -> None:
    assert errors_page() == PAGE, "run: python -m docs.generate"


def raise_sites() -> list[tuple[str, int]]:
    """List the file and line of each place where an error of the package's classes is made, by another walk.

    errors.py, which defines them, makes none but for a caller of `needs_extra`, whose place counts.
    """
    makers = "|".join([*CLASSES, "needs_extra"])
    found = []
    for path in PACKAGE.rglob("*.py"):
        if path.name == "errors.py":
            continue
        lines = path.read_text().splitlines()
        for number, line in enumerate(lines, 1):
            if re.search(rf"(?<![\w.\"'])(?:{makers})\((?!\w*\)?:)", line) and not line.startswith("class "):
                found.append((path.relative_to(PACKAGE).as_posix(), number))
    return found


def test_every_place_that_makes_an_error_is_on_the_page() -> None:
    sites, known = raise_sites(), {(error.file, error.line) for error in find_errors()}
    assert len(sites) > 300
    assert [site for site in sites if site not in known] == []


def test_only_errors_that_pass_on_another_text_have_none_of_their_own() -> None:
    assert {error.what for error in find_errors() if not error.has_words} <= PASSING_ON


@pytest.mark.parametrize("name", CLASSES)
def test_each_class_has_the_exit_code_of_its_heading(name: str) -> None:
    heading = PAGE[: PAGE.index(f"- `{name}`: ")].rpartition("## Exit code ")[2]
    assert heading.startswith(f"{CLASSES[name].exit_code}: ")


def test_every_entry_of_the_page_is_in_the_code_of_its_file() -> None:
    entries = re.findall(r'<a id="[^"]+"></a>(`[^`]+`|`` .+? ``) \((?:\w+, )?`([^`]+)`\)', " ".join(PAGE.split()))
    assert len(entries) == PAGE.count("<a id=")
    everywhere = " ".join(strings(path) for path in PACKAGE.rglob("*.py"))
    for text, file in entries:
        assert (PACKAGE / file).exists(), file
        pieces = [piece.split() for piece in re.split(rf"{HOLE}|[\[\]'/]", text.strip("` "))]
        pairs = [" ".join(words[start : start + 2]) for words in pieces for start in range(len(words) - 1)]
        assert not pairs or any(pair in everywhere for pair in pairs), (file, text)
        assert [word for words in pieces for word in words if word.strip(".,;:()") not in everywhere] == [], (
            file,
            text,
        )


def strings(path: Path) -> str:
    """Return all texts of a file on one line."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return " ".join(
        " ".join(n.value.split()) for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)
    )


def entry_of(message: str) -> list[Error]:
    """Return the errors of the page that a message is one of."""
    flat = " ".join(message.split())
    return [
        error
        for error in find_errors()
        if re.fullmatch(".*".join(map(re.escape, error.text.split(HOLE))), flat.removeprefix("Error: "))
    ]


@pytest.mark.parametrize(
    "words",
    [
        ["recipe", "show", "nonsense"],
        ["inspect", "no/such/cache"],
        ["recipe", "explain", "nonsense"],
        ["recipe", "schema", "nonsense"],
    ],
)
def test_an_error_as_it_is_printed_is_found_on_the_page(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) in (2, 3)
    assert entry_of(capsys.readouterr().err)


def test_all_classes_of_errors_are_walked() -> None:
    assert {errors.RecipeError, errors.CacheError, errors.RemoteError} <= set(CLASSES.values())
    others = [
        node.name
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base) in CLASSES for base in node.bases)
    ]
    assert set(others) == set(CLASSES) - {"LogitCacheError"}
