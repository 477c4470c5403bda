"""The loader's worker processes: what they pass on, and that they end."""

import gc
import json
import multiprocessing
import multiprocessing.forkserver
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from logitcache.errors import DataError, KilledWorkerError, LogitCacheError
from logitcache.views.epochs import EpochLoader
from logitcache.views.keys import ViewKey
from logitcache.views.loader import ViewLoader
from logitcache.views.spec import Views, ViewSpec
from tests.views.images import Images, textured


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_unreadable_image_is_the_data_error_itself_and_the_loader_lives_on(num_workers):
    views = Views(Images(textured(12, 8, 8), broken=5), ViewSpec())
    loader = ViewLoader(views, num_workers, "fork")
    with pytest.raises(DataError) as refused:
        list(loader.render([[ViewKey(0, index)] for index in range(12)]))
    assert type(refused.value) is DataError
    assert str(refused.value) == "image 5 cannot be read"
    assert len(list(loader.render([[ViewKey(0, 0)], [ViewKey(0, 1)]]))) == 2


@pytest.mark.parametrize("start_method", ["fork", "forkserver"])
def test_workers_of_a_loader_in_a_cycle_end_at_once(start_method):
    loader = ViewLoader(Views(Images(textured(8, 8, 8)), ViewSpec()), 2, start_method)
    before = set(multiprocessing.active_children())
    batches = loader.render([[ViewKey(0, index)] for index in range(8)])
    next(batches), next(batches)  # one of each worker: both have started
    workers = set(multiprocessing.active_children()) - before
    cycle: list[object] = [loader, batches]
    cycle.append(cycle)
    del loader, batches, cycle
    gc.collect()
    assert [worker.exitcode for worker in workers] == [0, 0]


@pytest.mark.parametrize("start_method", ["fork", "forkserver"])
def test_a_killed_worker_stops_the_run_which_can_go_on(start_method):
    loader = ViewLoader(Views(Images(textured(12, 8, 8), fatal=5), ViewSpec()), 2, start_method)
    with pytest.raises(KilledWorkerError, match=r"killed by SIGKILL.*\n  Fix: the same command continues") as stopped:
        list(loader.render([[ViewKey(0, index)] for index in range(12)]))
    assert stopped.value.exit_code == 75


@pytest.mark.parametrize("start_method", ["fork", "forkserver"])
def test_a_worker_that_ends_is_an_error_with_a_fix_and_no_hang(start_method):
    loader = ViewLoader(Views(Images(textured(12, 8, 8), deadly=5), ViewSpec()), 2, start_method)
    with pytest.raises(LogitCacheError, match=r"ended with exit code 7.*\n  Fix: a script of your own") as refused:
        list(loader.render([[ViewKey(0, index)] for index in range(12)]))
    assert refused.value.exit_code == 2


def test_an_error_of_a_data_set_is_raised_as_it_is_and_not_blamed_on_a_worker():
    class Failing(Images):
        def read(self, index):
            raise ConnectionResetError("the data set's own")

    loader = ViewLoader(Views(Failing(textured(4, 8, 8)), ViewSpec()), 1, "fork")
    with pytest.raises(ConnectionResetError, match="the data set's own"):
        list(loader.render([[ViewKey(0, 0)]]))


def test_workers_are_killed_between_epochs_and_while_nobody_waits():
    loader = ViewLoader(Views(Images(textured(8, 8, 8)), ViewSpec()), 2, "forkserver")
    assert len(list(loader.render([[ViewKey(0, 0)], [ViewKey(0, 1)]]))) == 2
    os.kill(loader._workers[0].pid, signal.SIGKILL)
    with pytest.raises(KilledWorkerError, match="SIGKILL"):
        list(loader.render([[ViewKey(0, index)] for index in range(8)]))


def test_a_killed_forkserver_stops_the_run_which_can_go_on(monkeypatch):
    look = torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data
    monkeypatch.setattr(look, "__defaults__", (0.2,))  # seconds after which torch looks whether workers live
    loader = ViewLoader(Views(Images(textured(4, 8, 8), endless=3), ViewSpec()), 1, "forkserver")
    batches = loader.render([[ViewKey(0, index)] for index in range(4)])
    next(batches)
    # A scheduler sends SIGTERM to all processes of a job, and this one does not ignore it.
    os.kill(multiprocessing.forkserver._forkserver._forkserver_pid, signal.SIGTERM)
    with pytest.raises(KilledWorkerError, match=r"starts those that render.*\n  Fix: the same command continues"):
        list(batches)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_that_another_has_replaced_is_not_continued_with_its_images(num_workers):
    views = Views(Images(textured(40, 8, 8)), ViewSpec(num_views=2))
    loader = EpochLoader(views, batch_size=8, num_workers=num_workers, start_method="fork")
    first, second = loader.epoch(0), loader.epoch(1)
    next(first)
    next(second)
    with pytest.raises(RuntimeError, match="one loader serves one at a time"):
        next(first)
    assert len(list(second)) == len(loader) - 1


def test_a_released_loader_ends_its_workers():
    loader = ViewLoader(Views(Images(textured(4, 8, 8)), ViewSpec()), 2, "fork")
    before = set(multiprocessing.active_children())
    batches = loader.render([[ViewKey(0, index)] for index in range(4)])
    next(batches)
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    del loader, batches
    assert not any(worker.is_alive() for worker in workers)


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_a_worker_that_is_killed_while_the_main_process_computes_raises_where_batches_are_awaited(start_method):
    before = signal.getsignal(signal.SIGCHLD)
    loader = ViewLoader(Views(Images(textured(16, 8, 8)), ViewSpec()), 1, start_method)
    batches = loader.render([[ViewKey(0, index)] for index in range(16)])
    next(batches)
    [worker] = loader._workers
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    assert signal.getsignal(signal.SIGCHLD) == before
    with pytest.raises(KilledWorkerError):
        list(batches)


@pytest.fixture(scope="module")
def small_shared_memory() -> dict[str, dict[str, Any]]:
    """Render with little shared memory; returns, by its size, whether images are right, or the error."""
    unshare = next((["unshare", flags] for flags in ("-m", "-Urm") if succeeds("unshare", flags, "true")), None)
    if unshare is None:
        pytest.skip("needs a mount namespace")
    command = [*unshare, sys.executable, "-m", "tests.views.small_shared_memory"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=root, check=False)
    if done.returncode == 77:
        pytest.skip("needs to mount a tmpfs")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def succeeds(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("size", ["64k", "160k"])
def test_images_that_shared_memory_has_no_room_for_come_through_a_pipe(small_shared_memory, size):
    found = small_shared_memory[size]
    if torch.__version__.startswith("2.6.") and "killed by SIGBUS" in (found["error"] or ""):
        pytest.skip("torch 2.6 reserves no shared memory before it writes there; the error says what killed the worker")
    assert found["error"] is None
    assert found["identical"]
    [warning] = found["warnings"]
    assert "No space left on device" in warning
    assert "Fix: a larger /dev/shm" in warning


def test_workers_for_which_there_is_no_semaphore_are_an_error_with_a_fix_at_once(small_shared_memory):
    found = small_shared_memory["4k"]
    assert re.search(r"cannot start: No space left on device.\n  Fix: num_workers: 0", found["error"])
    assert found["exit_code"] == 2
    assert found["seconds"] < 5


SCRIPT = """
import multiprocessing, os, sys, time
from logitcache.views.keys import ViewKey
from logitcache.views.loader import ViewLoader
from logitcache.views.spec import Views, ViewSpec
from tests.views.images import Images, textured
if __name__ == "__main__":
    loader = ViewLoader(Views(Images(textured(8, 8, 8)), ViewSpec()), 2, sys.argv[1])
    batches = loader.render([[ViewKey(0, index)] for index in range(8)])
    next(batches), next(batches)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    if sys.argv[2] != "return":
        os.kill(os.getpid(), int(sys.argv[2]))
        time.sleep(60)
"""


def gone(pid: int) -> bool:
    """Say whether a process has ended, be it reaped or not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state in "ZX"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at /proc")
@pytest.mark.parametrize(("start_method", "end"), [("fork", "return"), ("forkserver", "return"), ("forkserver", "9")])
def test_workers_end_with_the_process_that_started_them(tmp_path, start_method, end):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-W", "error", str(script), start_method, end]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": root}, check=False
    )
    assert done.returncode == (0 if end == "return" else -9), done.stderr
    workers = [int(pid) for pid in done.stdout.split()]
    assert len(workers) == 2
    # The pipes of the output close with the last process that holds them, so the workers have ended by now, or just do.
    for _ in range(200):
        if all(map(gone, workers)):
            break
        torch.randn(500, 500).sum()
    assert all(map(gone, workers))
