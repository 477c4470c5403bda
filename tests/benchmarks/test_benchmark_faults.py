"""What benchmarks/faults.py notes, so that it continues where it was stopped."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def faults() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        # Behind the standard library, which has an `encodings` too.
        patch.setattr(sys, "path", [*sys.path, str(BENCHMARKS)])
        return runpy.run_path(str(BENCHMARKS / "faults.py"))


def test_what_is_done_is_not_done_again_also_after_a_half_written_line(faults: dict[str, Any], tmp_path: Path) -> None:
    file, done = tmp_path / "state", []
    for number in range(3):
        state = faults["State"](file, {"quick": True})
        for key in range(2 + number):
            assert state.once(f"kill {key}", lambda key=key: done.append(key) or [key]) == [key]  # type: ignore[misc]
        file.write_text(file.read_text() + '["kill 9", []')
    assert done == [0, 1, 2, 3]
    assert json.loads(file.read_text().splitlines()[0]) == ["run", {"quick": True}]
    with pytest.raises(SystemExit, match="Fix: remove it, or --state another"):
        faults["State"](file, {"quick": False})


def test_kills_are_shared_out_among_all_commands_that_write(faults: dict[str, Any]) -> None:
    names = [sys.modules["fault_kills"]._command(number).name for number in range(100)]
    assert {name: names.count(name) for name in names} == {
        command.name: command.share for command in sys.modules["fault_kills"].COMMANDS
    }
    assert {"precompute", "growth", "derive", "repair", "train-student", "gc", "workers"} == set(names)
