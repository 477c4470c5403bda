"""What the benchmarks share: their options, figures beside goals, exit codes, and timing in turns."""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from logitcache.runtime.console import configure
from logitcache.runtime.versions import versions

Work = Callable[[int], object]
"""What is measured: the argument counts the rounds."""


class Row(NamedTuple):
    """A figure beside its goal; a goal of 0 that is no limit asks for nothing."""

    case: str
    figure: float
    goal: float
    unit: str = "x"
    at_most: bool = False
    note: str = ""

    @property
    def met(self) -> bool:
        """Return whether the goal is met."""
        return self.figure <= self.goal if self.at_most else self.figure >= self.goal

    def line(self, width: int) -> str:
        """Return the row as text, its case padded to a width."""
        goal = f"goal {'<=' if self.at_most else '>='} {self.goal:g}" if self.at_most or self.goal else ""
        missed = "" if self.met else "   MISSED"
        return f"{self.case:<{width}} {self.figure:>8.2f} {self.unit:<4} {goal + missed:<24} {self.note}"


def parser_of(description: str | None, quick: str, folder: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of a benchmark; `quick` and `folder` say what the options do, the latter if there is one."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    if folder is not None:
        parser.add_argument("--folder", help=folder)
    return parser


def run_benchmark(
    parser: argparse.ArgumentParser,
    rows_of: Callable[[Path, bool], Iterable[Row]],
    width: int,
    num_threads: int | None = 1,
    shared: Callable[[bool], Mapping[str, Any]] = lambda quick: {},
) -> int:
    """Measure rows in a temporary folder, print each as it is found, or one JSON document; return the exit code.

    `num_threads` is that of torch, by default one; None leaves it. `shared` returns further entries of the document.
    """
    arguments = parser.parse_args()
    configure(quiet=True)
    if num_threads is not None:
        import torch

        torch.set_num_threads(num_threads)
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        for row in rows_of(Path(name), arguments.quick):
            rows.append(row)
            if not arguments.json:
                print(row.line(width), flush=True)
    if arguments.json:
        results = [row._asdict() | {"figure": round(row.figure, 3), "met": row.met} for row in rows]
        print_json(results, **shared(arguments.quick))
    return exit_code(row.met for row in rows)


def print_json(results: Sequence[Any] | Mapping[str, Any], **shared: Any) -> None:
    """Print the one document of `--json`."""
    print(json.dumps({"versions": versions(), **shared, "results": results}, indent=2))


def exit_code(met: Iterable[bool]) -> int:
    """Return 0 if every goal is met, else 1."""
    return 0 if all(met) else 1


def seconds(work: Callable[[], object], clock: Callable[[], float] = time.process_time) -> float:
    """Return how long a call takes; by CPU time, which what others do on the machine changes less."""
    started = clock()
    work()
    return clock() - started


def alternate(ours: Work, theirs: Work, rounds: int, least_seconds: float = 0.0) -> tuple[list[float], list[float]]:
    """Return the CPU seconds of both in each round, at least so many rounds and for so long.

    Who begins changes each round. Round 0 warms up and does not count.
    """
    mine: list[float] = []
    others: list[float] = []
    seconds(lambda: theirs(0)), seconds(lambda: ours(0))
    started = time.monotonic()
    while len(mine) < rounds or time.monotonic() - started < least_seconds:
        number = len(mine) + 1
        for work, times in ((ours, mine), (theirs, others))[:: 1 if number % 2 else -1]:
            times.append(seconds(lambda work=work, number=number: work(number)))  # type: ignore[misc]
    return mine, others
