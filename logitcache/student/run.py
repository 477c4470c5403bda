"""A run directory: its recipe, its metrics, its checkpoint and its weights."""

import csv
import fcntl
import io
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
import yaml

from logitcache.errors import CacheError, MismatchError, RecipeError
from logitcache.files import remove_leftovers, write_atomically
from logitcache.recipe import Component, dump_recipe, load_recipe
from logitcache.student.ranks import ALONE, Ranks
from logitcache.versions import versions

# What may change between a run and its continuation: how fast and where, never what is computed. Places are free
# since the identity of what lies there is compared.
_FREE = (
    *("device", "num_workers", "start_method", "checkpoint_steps", "verify", "teachers"),
    *("validation.groups", "validation.taps"),
)
_PLACES = ("out", "cache", "dataset", "validation.cache", "validation.dataset")

P = ParamSpec("P")
T = TypeVar("T")


def _by_first(
    method: Callable[Concatenate["RunDirectory", P], T],
) -> Callable[Concatenate["RunDirectory", P], T]:
    """Let the first of several ranks alone touch the directory: the others get what it found."""

    @wraps(method)
    def shared(run: "RunDirectory", /, *args: P.args, **options: P.kwargs) -> T:
        return run.ranks.by_first(lambda: method(run, *args, **options))

    return shared


class RunDirectory:
    """Where a training run keeps what it makes; several ranks call it together, and the first reads and writes."""

    def __init__(self, path: str, ranks: Ranks = ALONE) -> None:
        self.path = Path(path)
        self.ranks = ranks
        self.checkpoint = self.path / "checkpoint.pt"
        self._result = self.path / "result.json"
        self._recipe, self._environment = self.path / "recipe.yaml", self.path / "environment.json"
        self._metrics = self.path / "metrics.jsonl"
        self._rows: list[dict[str, Any]] = []
        self._lock: int | None = None

    @property
    @_by_first
    def begun(self) -> bool:
        """Whether there is something to continue."""
        return self._begun

    @property
    def _begun(self) -> bool:
        return self.checkpoint.exists() or self._result.exists()

    @property
    @_by_first
    def rows(self) -> list[dict[str, Any]]:
        """The metrics of the finished epochs."""
        return list(self._rows)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep every other training out of the directory while the block runs; the lock ends with the process."""
        try:
            self._take()
            yield
        finally:
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    @_by_first
    def _take(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RecipeError(f"another training writes to {self.path}. Fix: wait, or another `out:`") from error

    @_by_first
    def require_free(self) -> None:
        """Raise RecipeError where a run has begun."""
        if self._begun:
            raise RecipeError(f"{self.path} holds a run already. Fix: --resume to continue it, or another `out:`")

    @_by_first
    def require_recipe(self, recipe: Component) -> None:
        """Raise MismatchError unless a run that has begun has the same recipe, apart from places and speed."""
        if not self._begun:
            return
        try:
            old = _entries(load_recipe(self._recipe, type(recipe)))
        except RecipeError as error:
            raise MismatchError(f"{self.path} is a run of another kind of recipe: {error}") from error
        new = _entries(recipe)
        lines = [
            f"{key}: the run has {old.get(key)!r}, the recipe {new.get(key)!r}"
            for key in dict.fromkeys([*old, *new])
            if old.get(key) != new.get(key)
        ]
        if lines:
            raise MismatchError(
                f"{self.path} is a run of another recipe:\n  "
                + "\n  ".join(lines)
                + "\n  Fix: change these back to continue it, or give another `out:`"
            )

    @_by_first
    def learns_from(self) -> dict[str, Any]:
        """Return the identity of what a run that has begun learns from; nothing of one that has not."""
        return self._learns_from()

    def _learns_from(self) -> dict[str, Any]:
        found: dict[str, Any] = self._read_json(self._environment)["learns_from"] if self._begun else {}
        return found

    @_by_first
    def require_identity(self, identity: dict[str, Any]) -> None:
        """Raise MismatchError unless a run that has begun learns from the same data and is measured on the same."""
        if not self._begun:
            return
        old, new = dict(_flat(self._learns_from())), dict(_flat(identity))
        changed = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]
        if changed:
            raise MismatchError(
                f"{self.path} was begun on other data; these differ: {', '.join(changed)}. "
                "Fix: name the cache and the images that it was begun on, or give another `out:`"
            )

    @_by_first
    def open(self, recipe: Component, identity: dict[str, Any]) -> None:
        """Fill the directory and say in it what the run is; a continuation adds its versions where they changed."""
        sessions = self._read_json(self._environment)["versions"] if self._begun else []
        if versions() not in sessions[-1:]:
            sessions.append(versions())
        remove_leftovers(self.path)
        write_atomically(self._recipe, dump_recipe(recipe).encode())
        environment = {"versions": sessions, "learns_from": identity}
        write_atomically(self._environment, json.dumps(environment, indent=2).encode())

    @_by_first
    def rewind(self, epoch: int) -> None:
        """Forget the metrics of `epoch` and later ones, which will be computed again."""
        lines = self._metrics.read_text().splitlines() if self._metrics.exists() else []
        try:
            self._rows = [row for row in map(json.loads, lines) if row["epoch"] < epoch]
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(self._metrics, error) from error
        if [row["epoch"] for row in self._rows] != list(range(epoch)):
            raise self._damaged(self._metrics, "it lacks epochs that the checkpoint has")

    @_by_first
    def record(self, row: dict[str, Any]) -> None:
        """Add an epoch's metrics to metrics.jsonl and metrics.csv."""
        self._rows.append(row)
        write_atomically(self._metrics, "".join(json.dumps(r) + "\n" for r in self._rows).encode())
        table = io.StringIO()
        writer = csv.DictWriter(table, list(dict.fromkeys(key for r in self._rows for key in r)))
        writer.writeheader()
        writer.writerows(self._rows)
        write_atomically(self.path / "metrics.csv", table.getvalue().encode())

    @_by_first
    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Write the state, whole or not at all."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomically(self.checkpoint, buffer.getbuffer())

    @_by_first
    def load_checkpoint(self) -> dict[str, Any] | None:
        """Read the state to the CPU, running nothing that the file holds; None when there is none yet."""
        if not self.checkpoint.exists():
            return None
        try:
            with zipfile.ZipFile(self.checkpoint) as archive:
                # torch does not compare the checksums.
                if (name := archive.testzip()) is not None:
                    raise self._damaged(self.checkpoint, f"the checksum of {name} differs")
            state: dict[str, Any] = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        except CacheError:
            raise
        except Exception as error:  # damage can surface as almost anything in a reader of archives
            raise self._damaged(self.checkpoint, error) from error
        return state

    @_by_first
    def finish(self, result: dict[str, Any]) -> None:
        """Write what the run measured: the run is finished."""
        write_atomically(self._result, json.dumps(result, indent=2).encode())

    @_by_first
    def finished(self) -> dict[str, Any] | None:
        """Return what a finished run measured, where it lies now; None for one that is not finished."""
        return self._read_json(self._result) | {"out": str(self.path)} if self._result.exists() else None

    def _read_json(self, path: Path) -> dict[str, Any]:
        try:
            content: dict[str, Any] = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise self._damaged(path, error) from error
        return content

    def _damaged(self, path: Path, cause: object) -> CacheError:
        reason = str(cause).partition("\n")[0]
        return CacheError(
            f"{path} is damaged: {reason}. Fix: put back a copy of it, or train again: remove {self.path}, or give "
            "another `out:`"
        )


def _entries(recipe: Component) -> dict[str, Any]:
    """List what decides the numbers, by dotted key."""
    return {
        key: value
        for key, value in _flat(yaml.safe_load(dump_recipe(recipe)))
        if not any(f"{key}.".startswith(f"{free}.") for free in (*_FREE, *_PLACES))
    }


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not items:
        yield key, value
    for name, item in items:
        yield from _flat(item, f"{key}.{name}" if key else str(name))
