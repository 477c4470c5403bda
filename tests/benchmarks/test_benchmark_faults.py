"""What benchmarks/faults.py notes, so that it continues where it was stopped."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def cases() -> Iterator[ModuleType]:
    """Import the cases, which import all the programs that they run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("fault_cases")


@pytest.fixture(scope="module")
def faults(cases: ModuleType) -> ModuleType:
    return importlib.import_module("faults")


def test_what_is_done_is_not_done_again_also_after_a_half_written_line(faults: ModuleType, tmp_path: Path) -> None:
    file, done = tmp_path / "state", []
    for number in range(3):
        state = faults.State(file, {"quick": True})
        for key in range(2 + number):
            assert state.once(f"kill {key}", lambda key=key: done.append(key) or [key]) == [key]  # type: ignore[misc]
        file.write_text(file.read_text() + '["kill 9", []')
    assert done == [0, 1, 2, 3]
    assert json.loads(file.read_text().splitlines()[0]) == ["run", {"quick": True}]
    with pytest.raises(SystemExit, match="Fix: remove it, or --state another"):
        faults.State(file, {"quick": False})


def test_kills_are_shared_out_among_all_commands_that_write(cases: ModuleType) -> None:
    kills = importlib.import_module("fault_kills")
    names = [kills._command(number).name for number in range(100)]
    assert {name: names.count(name) for name in names} == {command.name: command.share for command in kills.COMMANDS}
    assert {"precompute", "growth", "derive", "synthesize", "repair", "train-student", "gc", "workers"} == set(names)


@pytest.mark.parametrize("count", [100, 1000])
def test_so_many_times_commands_are_killed_and_every_command_is(count: int, cases: ModuleType) -> None:
    kills = importlib.import_module("fault_kills")
    numbers = kills.numbers(count)
    assert count <= sum(map(kills._times, numbers)) <= count + 1
    assert {kills._command(number).name for number in numbers} == {command.name for command in kills.COMMANDS}
