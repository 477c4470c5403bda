"""Scripts that start processes without a guard are refused once, before a process runs them again."""

import subprocess
import sys
from pathlib import Path

import pytest

START = 'require_main_guard("num_workers 2")'
HEAD = 'from logitcache.runtime.main_guard import require_main_guard\nprint("runs")\n'
GUARD = 'if __name__ == "__main__":'
UNGUARDED = {
    "plain": START,
    "a loop": f"for epoch in range(2):\n    {START}",
    "a function": f"def main():\n    {START}\n\nmain()",
    "another condition": f"import sys\nif sys.argv:\n    {START}",
    "a guard that comes later": f"{START}\n{GUARD}\n    pass",
}
GUARDED = {
    "a block": f"{GUARD}\n    {START}",
    "a function": f"def main():\n    {START}\n\n{GUARD}\n    main()",
    "an early end": f'if __name__ != "__main__":\n    raise SystemExit\n{START}',
    "another thread": f"import threading\n{GUARD}\n    threading.Thread(target=lambda: {START}).run()",
}


def run(folder: Path, body: str) -> subprocess.CompletedProcess[str]:
    script = folder / "script.py"
    script.write_text(HEAD + body + '\nprint("done")\n')
    root = str(Path(__file__).parents[2])
    environment = {"PYTHONPATH": root, "HOME": str(folder), "PATH": "/usr/bin:/bin"}
    return subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, timeout=120)


@pytest.mark.parametrize("name", UNGUARDED)
def test_a_script_without_a_guard_is_refused_with_the_line(name: str, tmp_path: Path) -> None:
    found = run(tmp_path, UNGUARDED[name])
    assert found.stdout == "runs\n"
    assert f"RecipeError: {tmp_path}/script.py:" in found.stderr
    assert "Fix: put the code that script.py runs below `if __name__ == '__main__':`" in found.stderr


@pytest.mark.parametrize("name", GUARDED)
def test_a_script_with_a_guard_runs(name: str, tmp_path: Path) -> None:
    found = run(tmp_path, GUARDED[name])
    assert (found.returncode, found.stdout) == (0, "runs\ndone\n"), found.stderr


def test_code_that_is_no_file_runs() -> None:
    subprocess.run([sys.executable, "-c", HEAD + START], check=True, capture_output=True)


LOADER = """
import torch
from logitcache.views.epochs import EpochLoader
from logitcache.views.spec import Views, ViewSpec
from tests.views.images import Images, textured

for batch in EpochLoader(Views(Images(textured(5, 6, 6)), ViewSpec()), batch_size=5, num_workers=2).epoch(0):
    print(len(batch))
"""


def test_a_loader_with_workers_raises_one_error_and_its_fix_helps(tmp_path: Path) -> None:
    found = run(tmp_path, LOADER)
    assert found.stdout == "runs\n"
    assert found.stderr.count("Traceback") == 1
    assert "starts processes (num_workers 2)" in found.stderr
    *lines, loop, body = LOADER.strip().splitlines()
    fixed = run(tmp_path, "\n".join([*lines, GUARD, f"    {loop}", f"    {body}"]))
    assert (fixed.returncode, "5\n" in fixed.stdout) == (0, True), fixed.stderr
