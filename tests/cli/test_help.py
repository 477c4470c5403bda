"""The help of every command, completion by the shell, and the hint at the command that follows."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from logitcache.cli.app import main
from logitcache.cli.commands import app
from logitcache.cli.help import DOCS

ROOT = Path(__file__).parents[2]
STUDENT = ROOT / "pipelines/fashion_mnist/student.yaml"


def paths(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield every command and group by the words that name it."""
    yield path
    for name, inner in getattr(command, "commands", {}).items():
        yield from paths(inner, (*path, name))


EVERY = list(paths(get_command(app)))


def help_of(path: tuple[str, ...], **options: Any) -> str:
    return CliRunner().invoke(app, [*path, "--help"], prog_name="logitcache", **options).output


@pytest.mark.parametrize("path", EVERY, ids=" ".join)
def test_every_help_has_an_example_that_parses_a_page_that_exists_and_the_next_step(path: tuple[str, ...]) -> None:
    text = help_of(path)
    [example] = re.findall(r"^  Example:  logitcache (.+)$", text, re.MULTILINE)
    [page] = re.findall(rf"^  More:     {re.escape(DOCS)}/(\S+)$", text, re.MULTILINE)
    assert (ROOT / "docs" / page).is_file()
    [following] = re.findall(r"^  Next:     (.+)$", text, re.MULTILINE)
    words = shlex.split(example)
    assert words[: len(path)] == list(path)
    if following.startswith("logitcache "):
        assert tuple(following.split()[1 : 3 if "recipe" in following.split()[1:2] else 2]) in EVERY
    command = max((known for known in EVERY if tuple(words[: len(known)]) == known), key=len)
    options = [word for word in words if word.startswith("--")]
    assert all(option in help_of(command) for option in options)
    for word in words:
        assert not word.startswith("pipelines/") or (ROOT / word).is_file()


def test_every_command_is_below_the_heading_of_its_group() -> None:
    sections = re.split(r"^(\S.+):$", help_of(()), flags=re.MULTILINE)
    found = {
        title: re.findall(r"^  ([a-z-]+)  ", text, re.MULTILINE)
        for title, text in zip(sections[1::2], sections[2::2], strict=True)
    }
    del found["Options"]
    assert len(found) >= 4
    stage_one = ["plan", "precompute", "synthesize", "materialize", "import-targets", "derive"]
    assert found["Stage one: make a cache"] == stage_one
    names = [name for group in found.values() for name in group]
    assert sorted(names) == sorted(path[0] for path in EVERY if len(path) == 1)


@pytest.mark.parametrize("columns", [60, 100, 160])
def test_the_help_is_as_wide_as_the_terminal(columns: int) -> None:
    environment = os.environ | {"COLUMNS": str(columns)}
    command = [sys.executable, "-m", "logitcache", "precompute", "--help"]
    text = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    widest = max(map(len, text.partition("Example:")[0].splitlines()))
    assert columns - 25 < widest < columns


def complete(words: str) -> list[str]:
    """Ask as bash does, for the last word."""
    count = len(shlex.split(words)) - (0 if words.endswith(" ") else 1)
    answers = {"COMP_WORDS": words, "COMP_CWORD": str(count), "_LOGITCACHE_COMPLETE": "complete_bash"}
    command = [sys.executable, "-c", _COMPLETE]
    done = subprocess.run(command, env=_PATHS | answers, capture_output=True, text=True, check=True)
    heavy, _, found = done.stdout.rpartition("loaded ")[2].partition("\n")[0], "", done.stdout.partition("loaded ")[0]
    assert heavy == "[]"
    return found.split()


_PATHS = {"PATH": "/usr/bin:/bin"}
_COMPLETE = """
import sys
from logitcache.cli import main
try:
    main([])
finally:
    print("loaded", [name for name in ("torch", "zarr", "numpy") if name in sys.modules])
"""


def test_commands_and_recipes_are_completed() -> None:
    assert complete("logitcache pre") == ["precompute", "predict"]
    assert complete("logitcache recipe c") == ["check", "cp"]
    assert complete("logitcache recipe show image_") == [
        "image_folder",
        "image_folder/precompute",
        "image_folder/student",
    ]


def test_keys_of_a_recipe_and_teachers_of_its_cache_are_completed(tmp_path: Path) -> None:
    cache = tmp_path / "c.zarr"
    cache.mkdir()
    (cache / "zarr.json").write_text('{"attributes": {"logitcache": {"teachers": {"resnet50": {}, "vit": {}}}}}')
    recipe = tmp_path / "student.yaml"
    recipe.write_text(STUDENT.read_text().replace("caches/fashion_mnist/train.zarr", str(cache)))
    assert complete(f"logitcache train-student {recipe} --set optimizer.") == ["optimizer.kind=", "optimizer.lr="]
    assert complete(f"logitcache train-student {recipe} --set losses.0.teacher=v") == ["losses.0.teacher=vit"]
    assert complete(f"logitcache train-student {recipe} --set losses.0.tea") == [
        "losses.0.teacher=resnet50",
        "losses.0.teacher=vit",
    ]
    assert complete(f"logitcache suspects {cache} --teacher r") == ["resnet50"]
    assert complete(f"logitcache suspects --teacher vit {cache} --teacher ") == ["resnet50", "vit"]
    shutil.rmtree(cache)
    assert complete(f"logitcache train-student {recipe} --set losses.0.tea") == []
    assert complete(f"logitcache train-student {tmp_path}/none.yaml --set l") == []


def test_the_command_that_follows_is_on_stderr_for_people_alone(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["recipe", "cp", "cifar", str(tmp_path / "my recipes")]
    assert main(words) == 0
    out, err = capsys.readouterr()
    [command] = re.findall(r"^Next: logitcache (.+)$", err, re.MULTILINE)
    assert "Next" not in out
    assert main(shlex.split(command)) == 0
    [command] = re.findall(r"^Next: logitcache (.+)$", capsys.readouterr().err, re.MULTILINE)
    assert shlex.split(command) == ["precompute", str(tmp_path / "my recipes/cifar/precompute.yaml")]
    for silent in ("--json", "-q"):
        assert main([*words[:3], str(tmp_path / silent), silent]) == 0
        assert "Next" not in capsys.readouterr().err
    assert main(words) == 2
    assert "Next" not in capsys.readouterr().err
