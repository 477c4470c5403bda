"""Output folders, local or at a URL, in which each file is written atomically."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from logitcache.config.yaml_text import flattened
from logitcache.errors import CacheError, LogitCacheError, MismatchError
from logitcache.store.file_locks import locked
from logitcache.store.files import LEFTOVER
from logitcache.store.local import LocalStore
from logitcache.store.remote.client import Remote, is_remote
from logitcache.store.safe_files import parse_json

Document = dict[str, Any]

_SHOWN = 5
"""Differences that a message lists."""


class OutputFolder:
    """Files below a folder or URL; the file `description` describes their content, and is written first."""

    def __init__(self, out: str | Path, description: str) -> None:
        self._out, self._description = str(out), description
        self._here = None if is_remote(out) else Path(out).expanduser()
        self._files: Remote | LocalStore = Remote(self._out) if self._here is None else LocalStore(self._here)

    def __str__(self) -> str:
        return self._out

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Create the folder and lock it against other processes of this machine; a URL has no lock."""
        if self._here is None:
            yield
            return
        self._here.mkdir(parents=True, exist_ok=True)
        with locked(self._here):
            yield

    def description(self) -> dict[str, Any]:
        """Read the description; return an empty one if the file does not exist."""
        return self.read_json(self._description) if self.holds(self._description) else {}

    def describe(self, new: Document, grows: Callable[[Document, Document], bool], what: str) -> None:
        """Write the description; replace an older one if `grows(old, new)` is true.

        Raises MismatchError if the folder has a description of other content; `what` names that content.
        """
        old = self.description()
        if not old or (old != new and grows(old, new)):
            self.write(self._description, json.dumps(new, indent=2).encode() + b"\n")
        elif old != new:
            there, here = dict(flattened(old)), dict(flattened(new))
            keys = [key for key in dict.fromkeys([*there, *here]) if there.get(key) != here.get(key)]
            lines = [f"{key}: {there.get(key)!r} there, {here.get(key)!r} here" for key in keys[:_SHOWN]]
            more = [f"and {len(keys) - _SHOWN} more"] if len(keys) > _SHOWN else []
            differing = "\n  ".join([*lines, *more])
            raise MismatchError(f"'{self}' holds other {what}:\n  {differing}\n  Fix: another folder, or remove it")

    @property
    def is_local(self) -> bool:
        """Whether the folder is local."""
        return self._here is not None

    def holds(self, name: str) -> bool:
        """Whether a file exists."""
        return self._files.exists(name)

    def read(self, name: str) -> bytes:
        """Read a file."""
        return self._files.read(name)

    def read_json(self, name: str) -> dict[str, Any]:
        """Read a JSON document. Raises CacheError if it is damaged."""
        try:
            found = parse_json(self.read(name))
            if not isinstance(found, dict):
                raise ValueError("it is no object")
        except ValueError as cause:
            if isinstance(cause, LogitCacheError):
                raise
            raise CacheError(f"'{self}/{name}' is damaged: {cause}. Fix: remove it, and run again") from cause
        return found

    def write(self, name: str, content: bytes) -> None:
        """Write a file atomically, and remove the partial file of a killed writer."""
        if self._here is not None:
            path = self._here / name
            path.parent.mkdir(parents=True, exist_ok=True)
            for left in path.parent.glob(f"{path.name}.*{LEFTOVER}"):
                left.unlink(missing_ok=True)
        self._files.write(name, content)
