"""The progress of a sweep: a table that a terminal follows, and lines that a log file keeps."""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from logitcache.runtime.console import logger, shown_above, visible
from logitcache.student.runs.training_run import SHOWN
from logitcache.student.training_recipes import StudentRecipe
from logitcache.sweeps.cells import SweepStudent
from logitcache.sweeps.outcomes import Failure, outcome_of, record_failure

if TYPE_CHECKING:
    from rich.table import Table

SHOWN_ROWS = 24
"""Students of the table at a time: those that train or failed first."""
LOGGED_SECONDS = 60.0
"""Seconds between two tables in a log file."""
_ORDER = {"training": 0, "failed": 1, "waiting": 2, "finished": 3}


@dataclass
class _Standing:
    """How a student stands: its state, epochs done of all, and its last metrics."""

    state: str
    epochs: int
    of: int
    metrics: dict[str, Any]

    def cells(self) -> list[str]:
        """Return its row without the name."""
        loss = self.metrics.get("loss")
        name = next((name for name in SHOWN if f"val_{name}" in self.metrics), None)
        quality = "" if name is None else f"{name} {100 * self.metrics[f'val_{name}']:.2f} %"
        return [self.state, f"{self.epochs}/{self.of}", "" if loss is None else f"{loss:.4f}", quality]


class SweepProgress:
    """Every student of a sweep by the name of its run; a context in which a terminal shows them."""

    def __init__(self) -> None:
        """Begin without students."""
        self._standings: dict[str, _Standing] = {}
        self._ending = contextlib.ExitStack()
        self._is_live, self._logged = False, time.monotonic()

    def add(self, members: Sequence[SweepStudent]) -> None:
        """Read how runs stand that are not shown yet."""
        for member in members:
            if member.run in self._standings:
                continue
            outcome = outcome_of(member)
            state = "finished" if outcome.state == "finished" else "waiting"
            rows = outcome.rows[-1] if outcome.rows else {}
            self._standings[member.run] = _Standing(state, outcome.epochs, member.recipe.epochs, rows)

    def __enter__(self) -> Self:
        self._is_live = self._ending.enter_context(shown_above(self._table))
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.close()

    def show(self, run: str, found: dict[str, Any] | Failure) -> None:
        """Show the metrics of an epoch, or why a student failed."""
        standing = self._standings[run]
        if isinstance(found, Failure):
            standing.state = "failed"
            logger.info(f"{run} failed: {found.message}")
            return
        standing.epochs, standing.metrics = int(found["epoch"]) + 1, found
        standing.state = "finished" if standing.epochs >= standing.of else "training"
        if standing.state == "finished":
            logger.info("  ".join([f"{run}:", *standing.cells()]))
        elif not self._is_live and time.monotonic() - self._logged > LOGGED_SECONDS:
            self._logged = time.monotonic()
            logger.info(self._text())

    def refuse(self, recipe: StudentRecipe, error: Exception) -> None:
        """Record and show why a student cannot begin."""
        self.show(Path(recipe.out).name, record_failure(Path(recipe.out), error))

    def _rows(self) -> tuple[list[list[str]], int]:
        """Return the first students by state, and how many more there are."""
        ordered = sorted(self._standings.items(), key=lambda item: _ORDER[item[1].state])
        rows = [[visible(name, keep=""), *standing.cells()] for name, standing in ordered[:SHOWN_ROWS]]
        return rows, len(ordered) - len(rows)

    def _table(self) -> "Table":
        from rich.table import Table

        rows, more = self._rows()
        columns = ["student", "state", "epochs", "loss", "measured"]
        table = Table(*columns, caption=f"and {more} more" if more else None, box=None, pad_edge=False)
        for row in rows:
            table.add_row(*row)
        return table

    def _text(self) -> str:
        """Return the table as aligned lines."""
        rows, more = self._rows()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        return "\n".join(["students:", *(f"  {line}" for line in lines), *[f"  and {more} more"] * bool(more)])
