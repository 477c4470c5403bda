"""Does a cache survive what happens to computers?

    python benchmarks/faults.py [--quick] [--json] [--state FILE] [--case NAME]

Kills every command that writes at 1,000 moments of its life, and the workers of a Dask cluster while they start; flips
bits of, or truncates, 1,000 files of a cache; fills a small disk, and shared memory; lets several processes write one
cache while some are killed; writes and reads caches in storage that loses, cuts and delays answers; kills runs that
append images 100 times while students read. `--quick` does everything in fewer rounds: 100 kills, one of a worker that
starts, 100 damages, every third fault of storage, and 12 kills of runs that append. `--case` does one of these alone.
Run from a checkout, whose tests have the programs that do this. What is done is noted in the state file: the same
command continues where it was stopped, and removes the file at its end. Exits 1 if anything committed is lost, anything
bad is accepted, a command hangs, or the bytes differ from those of an undisturbed run.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY)]

from _harness import exit_code, parser_of, print_json  # noqa: E402

from logitcache.runtime.console import configure  # noqa: E402
from logitcache.runtime.versions import versions  # noqa: E402


class State:
    """What earlier runs of the same command found, line by line in a file."""

    def __init__(self, file: Path, run: dict[str, Any]) -> None:
        self.file = file
        text = file.read_text() if file.exists() else ""
        # The last line may be half written.
        lines = text.rpartition("\n")[0].splitlines() or [json.dumps(["run", run])]
        self._found = dict(map(json.loads, lines))
        if self._found.get("run") != run:
            raise SystemExit(f"{file} is of another run: {self._found.get('run')}. Fix: remove it, or --state another")
        file.write_text("".join(json.dumps([key, value]) + "\n" for key, value in self._found.items()))

    def once(self, key: str, action: Callable[[], Any]) -> Any:
        """Return what an action found, now or in an earlier run."""
        if key not in self._found:
            self._found[key] = action()
            with self.file.open("a") as file:
                file.write(json.dumps([key, self._found[key]]) + "\n")
        return self._found[key]


def main() -> int:
    """Run every case and print what it found."""
    parser = parser_of(__doc__, "fewer of each, about two minutes")
    parser.add_argument("--state", type=Path, default=Path("faults.state"), help="where to note what is done")
    parser.add_argument("--case", help="the only one to do, such as new_images")
    options = parser.parse_args()
    # Not above: the workers that a case starts import this file.
    from fault_cases import CASES, HANGS, Case

    from tests.stage_one.apart import by_two, import_package

    configure(quiet=True)
    import_package()
    chosen = [case for case in CASES if options.case in (None, case.__name__)]
    if not chosen:
        parser.error(f"--case {options.case}: one of {', '.join(case.__name__ for case in CASES)}")
    state = State(options.state, {"quick": options.quick, "case": options.case, "versions": versions()})

    def found(case: Case) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="logitcache-faults-") as folder:
            result: dict[str, Any] = state.once(case.__name__, lambda: _timed(case, Path(folder), options.quick, state))
        if not options.json:
            print(f"{case.__name__:11} {result}", flush=True)
        return result

    first, *others = chosen  # the first takes both processors
    results = dict(zip([case.__name__ for case in chosen], [found(first), *by_two(others, found, HANGS)], strict=True))
    state.file.unlink()
    if options.json:
        print_json(results, goal="nothing wrong")
    return exit_code(not result["wrong"] for result in results.values())


def _timed(case: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
    started = time.perf_counter()
    return case(*given) | {"seconds": round(time.perf_counter() - started, 1)}


if __name__ == "__main__":
    sys.exit(main())
