"""Hooks of MkDocs: pages that a computer can write, and links to files that lie outside of docs/."""

import inspect
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from typer.main import get_command
from typer.testing import CliRunner

import logitcache
from logitcache.cli.commands import app

ROOT = Path(__file__).parent.parent
COPIES = {"index.md": ROOT / "README.md", "contributing.md": ROOT / "CONTRIBUTING.md"}
"""Pages that are files of the repository's root."""

_LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s]+)(\))")


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages."""
    for page, source in COPIES.items():
        files.append(File.generated(config, page, content=source.read_text()))
    files.append(File.generated(config, "reference/command-line.md", content=command_line()))
    files.append(File.generated(config, "reference/python.md", content=python_api()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links at files outside of docs/ to the repository; those of copied pages to their pages."""
    folder = ROOT if page.file.src_uri in COPIES else (ROOT / "docs" / page.file.src_uri).parent
    here = (ROOT / "docs" / page.file.src_uri).parent
    pages = {source: ROOT / "docs" / name for name, source in COPIES.items()}

    def resolve(link: re.Match[str]) -> str:
        target, mark, anchor = link[2].partition("#")
        if not target or "://" in target:
            return link[0]
        file = Path(os.path.normpath(folder / target))
        file = pages.get(file, file)
        if file.is_relative_to(ROOT / "docs"):
            found = os.path.relpath(file, here)
        elif file.exists():
            found = f"{config.repo_url}/blob/main/{file.relative_to(ROOT).as_posix()}"
        else:
            raise PluginError(f"{page.file.src_uri} links to {target}, which does not exist")
        return f"{link[1]}{found}{mark}{anchor}{link[3]}"

    return _LINK.sub(resolve, markdown)


def command_line() -> str:
    """Return the help of every command."""
    found = [
        f"## {' '.join(path)}\n\n```text\n{_help(path)}```\n" for path in _commands(get_command(app), ("logitcache",))
    ]
    return "# Command line\n\n" + "\n".join(found)


def _commands(command: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    inner = getattr(command, "commands", {})
    for name, one in inner.items():
        yield from _commands(one, (*path, name))
    if not inner:
        yield path


def _help(path: tuple[str, ...]) -> str:
    return CliRunner().invoke(app, [*path[1:], "--help"], prog_name="logitcache", terminal_width=100).output


def python_api() -> str:
    """List the public names, whose docstrings mkdocstrings reads."""
    names = [name for name in logitcache.__all__ if name not in ("__version__", "losses")]
    functions = inspect.getmembers(logitcache.losses, inspect.isfunction)
    losses = [name for name, function in functions if function.__module__.startswith("logitcache.")]
    found = [f"::: logitcache.{name}" for name in names]
    found += ["## Losses", *(f"::: logitcache.student.losses.{name}" for name in losses)]
    return "# Python API\n\n```python\nimport logitcache as lc\n```\n\n" + "\n\n".join(found) + "\n"
