"""A run directory: its recipe, its metrics, its checkpoint and its weights."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import torch
import yaml

from logitcache.errors import MismatchError, RecipeError
from logitcache.files import remove_leftovers, write_atomically
from logitcache.recipe import Component, dump_recipe
from logitcache.versions import versions

# What may change between a run and its continuation: how fast and where, never what is computed.
_FREE = ("device", "num_workers", "start_method", "checkpoint_steps", "dataset", "teachers", "verify")


class RunDirectory:
    """Where a training run keeps what it makes."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self._rows: list[dict[str, Any]] = []

    @property
    def checkpoint(self) -> Path:
        """The state from which the run continues."""
        return self.path / "checkpoint.pt"

    @property
    def result(self) -> Path:
        """What a finished run measured; there only when it has finished."""
        return self.path / "result.json"

    def open(self, recipe: Component, identity: dict[str, Any], resume: bool) -> None:
        """Make the directory, or prove that the recipe is the one that made it.

        `identity` tells what the run learns from. Raises RecipeError for a run that is there and was not to be resumed,
        MismatchError for another recipe or another cache.
        """
        if self.checkpoint.exists() or self.result.exists():
            if not resume:
                raise RecipeError(f"{self.path} holds a run already. Fix: --resume to continue it, or another `out:`")
            self._require_same(recipe, identity)
        self.path.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.path)
        write_atomically(self.path / "recipe.yaml", dump_recipe(recipe).encode())
        environment = {"versions": versions(), "learns_from": identity}
        write_atomically(self.path / "environment.json", json.dumps(environment, indent=2).encode())

    def _require_same(self, recipe: Component, identity: dict[str, Any]) -> None:
        old = yaml.safe_load((self.path / "recipe.yaml").read_text())
        new = yaml.safe_load(dump_recipe(recipe))
        changed = [key for key in sorted(old.keys() | new.keys()) if key not in _FREE and old.get(key) != new.get(key)]
        lines = [f"{key}: the run has {old.get(key)!r}, the recipe {new.get(key)!r}" for key in changed]
        learnt = json.loads((self.path / "environment.json").read_text())["learns_from"]
        if learnt != identity:
            lines.append(f"what it learns from: the run has {learnt}, now it is {identity}")
        if lines:
            raise MismatchError(
                f"{self.path} is a run of another recipe:\n  "
                + "\n  ".join(lines)
                + "\n  Fix: change these back to continue it, or give another `out:`"
            )

    def rewind(self, epoch: int) -> None:
        """Forget the metrics of `epoch` and later ones, which will be computed again."""
        file = self.path / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        self._rows = [row for row in map(json.loads, lines) if row["epoch"] < epoch]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The metrics of the finished epochs."""
        return list(self._rows)

    def record(self, row: dict[str, Any]) -> None:
        """Add an epoch's metrics to metrics.jsonl and metrics.csv."""
        self._rows.append(row)
        write_atomically(self.path / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in self._rows).encode())
        table = io.StringIO()
        writer = csv.DictWriter(table, list(dict.fromkeys(key for r in self._rows for key in r)))
        writer.writeheader()
        writer.writerows(self._rows)
        write_atomically(self.path / "metrics.csv", table.getvalue().encode())

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Write the state, whole or not at all."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomically(self.checkpoint, buffer.getbuffer())

    def load_checkpoint(self, device: torch.device) -> dict[str, Any] | None:
        """Read the state, running nothing that the file holds; None when there is none yet."""
        if not self.checkpoint.exists():
            return None
        state: dict[str, Any] = torch.load(self.checkpoint, map_location=device, weights_only=True)
        return state

    def finish(self, result: dict[str, Any]) -> None:
        """Write what the run measured: the run is finished."""
        write_atomically(self.result, json.dumps(result, indent=2).encode())
