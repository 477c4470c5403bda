"""The documentation site: it builds without a warning, asks no other server, and has every page and name."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import logitcache
from logitcache.cli.commands import app

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return folder


def test_no_page_asks_another_server(site: Path) -> None:
    loads = {
        "*.html": r"<(?:script|img|iframe|source)[^>]+src=\"?https?:|<link[^>]+stylesheet[^>]+href=\"?https?:",
        "*.css": r"url\(.?https?:|@import.{0,9}https?:",
    }
    for pattern, load in loads.items():
        files = list(site.rglob(pattern))
        assert files
        assert [file for file in files if re.search(load, file.read_text())] == []


def test_every_public_name_and_every_command_is_described(site: Path) -> None:
    python = (site / "reference/python/index.html").read_text()
    names = set(logitcache.__all__) - {"__version__", "losses"}
    assert [name for name in names if f'id="logitcache.{name}"' not in python] == []
    commands = (site / "reference/command-line/index.html").read_text()
    shown = CliRunner().invoke(app, ["--help"]).output.partition("Start:")[2]
    listed = re.findall(r"^  ([a-z-]+) ", shown, re.MULTILINE)
    assert len(listed) > 10
    assert [name for name in listed if f"Usage: logitcache {name}" not in commands] == []


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")]
    assert [page for page in pages if f": {page}\n" not in navigation] == []
