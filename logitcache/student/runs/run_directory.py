"""A run directory: its recipe, its metrics, its checkpoint and its weights."""

import csv
import dataclasses
import hashlib
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from pydantic import JsonValue, TypeAdapter, ValidationError

from logitcache.config.recipe import Component, dump_recipe, load_recipe
from logitcache.config.trust import remember
from logitcache.config.yaml_text import flattened
from logitcache.errors import CacheError, MismatchError, RecipeError
from logitcache.models.weights import load_plain
from logitcache.runtime.versions import versions
from logitcache.store.file_locks import locked
from logitcache.store.files import remove_leftovers, write_atomically
from logitcache.store.safe_files import read_bounded, require_bounded
from logitcache.student.distributed.ranks import ALONE, Ranks

MAX_RECIPE_BYTES = 1 << 20
_MAX_JSON_BYTES = 64 << 20

_DAMAGE = (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, struct.error, zlib.error)
"""What readers of files and archives raise for damage."""

P = ParamSpec("P")
T = TypeVar("T")
C = TypeVar("C", bound=Component)


class Environment(Component):
    """The versions and the threads of each session of a run, and the identity of what it learns from."""

    versions: list[dict[str, str]]
    learns_from: dict[str, JsonValue]


_ROW: TypeAdapter[dict[str, int | float | None]] = TypeAdapter(dict[str, int | float | None])


def _by_first(method: Callable[Concatenate["RunDirectory", P], T]) -> Callable[Concatenate["RunDirectory", P], T]:
    """Call a method on the first rank alone, and broadcast its result."""

    @wraps(method)
    def shared(run: "RunDirectory", /, *args: P.args, **options: P.kwargs) -> T:
        return run.ranks.by_first(lambda: method(run, *args, **options))

    return shared


class RunDirectory:
    """The folder of a training run; all ranks call its methods together, and the first one reads and writes."""

    def __init__(self, path: str, ranks: Ranks = ALONE) -> None:
        self.path = Path(path)
        self.ranks = ranks
        self.checkpoint = self.path / "checkpoint.pt"
        self.best = self.path / "best.safetensors"
        self._result = self.path / "result.json"
        self._recipe, self._environment = self.path / "recipe.yaml", self.path / "environment.json"
        self._metrics = self.path / "metrics.jsonl"
        self._rows: list[dict[str, Any]] = []
        self.followers: list[Callable[[list[dict[str, Any]]], None]] = []  # get all rows after each epoch
        self._lock = ExitStack()

    @property
    def _begun(self) -> bool:
        return self.checkpoint.exists() or self._result.exists()

    @property
    @_by_first
    def begun(self) -> bool:
        """Whether there is something to continue."""
        return self._begun

    @property
    @_by_first
    def rows(self) -> list[dict[str, Any]]:
        """The metrics of the finished epochs."""
        return list(self._rows)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep every other training out of the directory while the block runs; the lock ends with the process."""
        with self._lock:
            self._take()
            yield

    @_by_first
    def _take(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.enter_context(locked(self.path, wait=False))
        except BlockingIOError as error:
            raise RecipeError(f"another training writes to {self.path}. Fix: wait, or another `out:`") from error

    @_by_first
    def begun_recipe(self, kind: type[C], resume: bool) -> C | None:
        """Read the recipe of a run that has begun; None of one that has not. Raises RecipeError without `resume`."""
        if not self._begun:
            return None
        if not resume:
            raise RecipeError(
                f"{self.path} holds a run already. Fix: --resume to continue it, another `out:`, or remove it"
            )
        with self.reading(self._recipe):
            require_bounded(self._recipe, MAX_RECIPE_BYTES)
        try:
            return load_recipe(self._recipe, kind)
        except RecipeError as error:
            raise MismatchError(f"{self.path} is a run of another kind of recipe: {error}") from error

    @_by_first
    def learns_from(self) -> dict[str, Any]:
        """Return the identity of what a run that has begun learns from; nothing of one that has not."""
        return self.environment().learns_from

    def environment(self) -> Environment:
        """Read the versions and the identity of what a run learns from; both empty for a run that has not begun."""
        empty = Environment(versions=[], learns_from={})
        return self.parsed(self._environment, TypeAdapter(Environment)) if self._begun else empty

    @_by_first
    def require_identity(self, identity: dict[str, Any]) -> None:
        """Raise MismatchError unless a run that has begun learns from the same data and is measured on the same."""
        if not self._begun:
            return
        old, new = dict(flattened(self.environment().learns_from)), dict(flattened(identity))
        changed = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]
        if changed:
            raise MismatchError(
                f"{self.path} was begun on other data; these differ: {', '.join(changed)}. "
                "Fix: name the cache and the images that it was begun on, or give another `out:`"
            )

    @_by_first
    def open(self, recipe: Component, identity: dict[str, Any]) -> None:
        """Write the recipe and the environment; a continuation adds its versions if they changed."""
        sessions = self.environment().versions
        session = versions() | {"threads": str(torch.get_num_threads())}  # sums are rounded by their number
        sessions += [session] * (session not in sessions[-1:])
        remove_leftovers(self.path)
        text = dump_recipe(recipe).encode()
        write_atomically(self._recipe, text)
        remember(hashlib.sha256(text).hexdigest())
        environment = {"versions": sessions, "learns_from": identity}
        write_atomically(self._environment, json.dumps(environment, indent=2).encode())

    @_by_first
    def rewind(self, epoch: int) -> None:
        """Forget the metrics of `epoch` and later ones, which will be computed again."""
        with self.reading(self._metrics):
            self._rows = [row for row in self.recorded() if row["epoch"] < epoch]
            if [row["epoch"] for row in self._rows] != list(range(epoch)):
                raise ValueError("it lacks epochs that the checkpoint has")

    def recorded(self) -> list[dict[str, Any]]:
        """Read the metrics of all epochs that were recorded."""
        with self.reading(self._metrics):
            lines = read_bounded(self._metrics, _MAX_JSON_BYTES).splitlines() if self._metrics.exists() else []
            rows = [_ROW.validate_json(line, strict=True) for line in lines]
            if any(not isinstance(row.get(key), int) for row in rows for key in ("epoch", "step")):
                raise ValueError("a line names no epoch or step")
            return rows

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
        for follow in self.followers:
            follow(self._rows)

    @_by_first
    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Write the state, whole or not at all."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomically(self.checkpoint, buffer.getbuffer())

    @_by_first
    def load_checkpoint(self, most_bytes: int) -> dict[str, Any]:
        """Read the state to the CPU, running nothing that the file holds.

        Raises CacheError for a file that is missing, damaged, or of more than `most_bytes`.
        """
        if not self.checkpoint.exists():
            raise CacheError(
                f"{self.checkpoint} is missing: a run cannot go on without it. Fix: put back a copy of it, or train "
                "again into another `out:`"
            )
        with self.reading(self.checkpoint):
            size = require_bounded(self.checkpoint, most_bytes)
            with zipfile.ZipFile(self.checkpoint) as archive:
                _require_stored(archive, size)
            state = load_plain(self.checkpoint)
            if not isinstance(state, dict):
                raise ValueError(f"it holds a {type(state).__name__}")
        return state

    @_by_first
    def finish(self, result: dict[str, Any]) -> None:
        """Write what the run measured: the run is finished."""
        write_atomically(self._result, json.dumps(result, indent=2).encode())

    @_by_first
    def finished(self, kind: type[T]) -> T | None:
        """Return what a finished run measured, as a dataclass; None for one that is not finished."""
        if not self._result.exists():
            return None
        found = self.parsed(self._result, TypeAdapter(kind))
        return dataclasses.replace(found, out=str(self.path))  # type: ignore[type-var]

    def parsed(self, path: Path, form: TypeAdapter[T]) -> T:
        """Read a JSON file of the run. Raises CacheError for one that is missing, damaged or too large."""
        with self.reading(path):
            return form.validate_json(read_bounded(path, _MAX_JSON_BYTES), strict=True)

    @contextmanager
    def reading(self, path: Path) -> Iterator[None]:
        """Raise CacheError naming a file of the run if reading it fails."""
        try:
            yield
        except _DAMAGE as error:
            reason = str(error).partition("\n")[0]
            if isinstance(error, ValidationError):
                first = error.errors()[0]
                reason = ": ".join([*map(str, first["loc"][-1:]), first["msg"]])
            raise CacheError(
                f"{path} is damaged: {reason}. Fix: put back a copy of it, or train again: remove {self.path}, or give "
                "another `out:`"
            ) from error


def _require_stored(archive: zipfile.ZipFile, size: int) -> None:
    """Raise ValueError unless an archive is uncompressed, as torch writes it, with checksums, which torch ignores."""
    entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or sum(e.file_size for e in entries) > size:
        raise ValueError("it is compressed, which torch does not write")
    if (name := archive.testzip()) is not None:
        raise ValueError(f"the checksum of {name} differs")
