"""The user's own objects by name."""

import sys
from pathlib import Path

import pytest

from logitcache.config.factories import call_factory, import_object
from logitcache.errors import RecipeError

MODULE = """
class Shelf:
    @staticmethod
    def make(size, *, name="x"):
        return size, name
number = 3
def fails():
    raise KeyError("inside")
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"module_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return name


def test_modules_of_the_working_directory_are_found(module: str) -> None:
    assert call_factory(f"{module}:Shelf.make", {"size": 2, "name": "y"}) == (2, "y")
    assert import_object("os.path:join")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torch", "Write it as 'package.module:function'"),
        (":fn", "Write it as"),
        ("no_such_module_at_all:fn", "there is no module 'no_such_module_at_all'"),
        ("os.pth:join", "there is no module 'os.pth'"),
        ("MODULE:Shelves", "Did you mean 'Shelf'"),
    ],
)
def test_wrong_name_says_what_to_write(module: str, name: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        import_object(name.replace("MODULE", module))


def test_failing_import_names_what_is_missing(module: str, tmp_path: Path) -> None:
    (tmp_path / f"{module}_b.py").write_text("import not_there_either")
    (tmp_path / f"{module}_c.py").write_text("1 / 0")
    with pytest.raises(RecipeError, match="needs 'not_there_either'"):
        import_object(f"{module}_b:fn")
    with pytest.raises(RecipeError, match="ZeroDivisionError"):
        import_object(f"{module}_c:fn")


def test_failing_call_keeps_its_cause(module: str) -> None:
    with pytest.raises(RecipeError, match="KeyError: 'inside'") as error:
        call_factory(f"{module}:fails", {})
    assert isinstance(error.value.__cause__, KeyError)
    with pytest.raises(RecipeError, match=r"fails' failed when called with \(size=1\): TypeError"):
        call_factory(f"{module}:fails", {"size": 1})
    with pytest.raises(RecipeError, match="of type int and cannot be called"):
        call_factory(f"{module}:number", {})
