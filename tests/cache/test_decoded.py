"""Decoded shards are shared by processes: once in memory, within a limit, and gone when nobody needs them."""

import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitcache.cache.cache import Cache, open_cache
from logitcache.errors import RecipeError
from logitcache.store.shared_memory import VARIABLE, SharedShards, shared_limit, shared_shards
from logitcache.views.keys import ViewKey
from tests.cache.made import ENCODINGS, made

SHAPE, DTYPE = (100, 4), np.dtype("<f4")
BYTES = 1600


class Decoding:
    """Decode a shard of one number, and count."""

    def __init__(self, value: float = 1.0) -> None:
        self.value, self.times = value, 0

    def __call__(self) -> np.ndarray[Any, Any]:
        self.times += 1
        return np.full(SHAPE, self.value, DTYPE)


def get(shards: SharedShards, name: str, decoding: Decoding) -> np.ndarray[Any, Any]:
    return shards.get(name, SHAPE, DTYPE, decoding)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_shard_is_decoded_once_and_found_by_others(tmp_path: Path) -> None:
    decoding = Decoding(3.0)
    first = get(SharedShards(tmp_path, 10 * BYTES), "a", decoding)
    second = get(SharedShards(tmp_path, 10 * BYTES), "a", decoding)
    assert decoding.times == 1
    assert (first == 3.0).all()
    assert np.array_equal(first, second)
    assert files(tmp_path) == {"a"}
    with pytest.raises(ValueError, match="read-only"):
        second[0] = 0


def test_the_least_recently_used_makes_room(tmp_path: Path) -> None:
    shards = SharedShards(tmp_path, 3 * BYTES)
    kept = []
    for number, name in enumerate("abc"):
        kept.append(get(shards, name, Decoding(float(number))))
        os.utime(tmp_path / name, (number, number))
    get(shards, "a", Decoding())
    get(shards, "d", Decoding(9.0))
    assert files(tmp_path) == {"a", "c", "d"}
    assert (kept[1] == 1.0).all()  # removed, and still readable where it is mapped


def test_what_does_not_fit_is_not_shared(tmp_path: Path) -> None:
    assert (get(SharedShards(tmp_path, BYTES - 1), "a", Decoding(2.0)) == 2.0).all()
    assert files(tmp_path) == set()


def test_a_full_memory_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    assert (get(SharedShards(tmp_path, 10 * BYTES), "a", Decoding(2.0)) == 2.0).all()
    assert files(tmp_path) == set()


def test_a_file_of_another_size_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 7)
    assert (get(SharedShards(tmp_path, 10 * BYTES), "a", Decoding(2.0)) == 2.0).all()
    assert (tmp_path / "a").stat().st_size == BYTES


def test_a_decoding_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fails() -> np.ndarray[Any, Any]:
        raise RuntimeError("damaged")

    with pytest.raises(RuntimeError, match="damaged"):
        SharedShards(tmp_path, 10 * BYTES).get("a", SHAPE, DTYPE, fails)
    assert files(tmp_path) == set()


def _slow(folder: Path, started: Any) -> None:
    def decode() -> np.ndarray[Any, Any]:
        started.set()
        time.sleep(60)
        return np.zeros(SHAPE, DTYPE)

    SharedShards(folder, 10 * BYTES).get("a", SHAPE, DTYPE, decode)


def test_a_process_killed_while_it_decodes_holds_up_nobody(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    started = context.Event()
    process = context.Process(target=_slow, args=(tmp_path, started))
    process.start()
    assert started.wait(30)
    assert files(tmp_path) == {"a.part"}
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert (get(SharedShards(tmp_path, 10 * BYTES), "b", Decoding(2.0)) == 2.0).all()
    assert files(tmp_path) == {"b"}  # what it left is removed to make room
    assert (get(SharedShards(tmp_path, 10 * BYTES), "a", Decoding(2.0)) == 2.0).all()
    assert files(tmp_path) == {"a", "b"}


def _counted(folder: Path, barrier: Any, counts: Any) -> None:
    decoding = Decoding(5.0)
    barrier.wait()
    shards = SharedShards(folder, 10 * BYTES)
    right = all((get(shards, str(number), decoding) == 5.0).all() for number in range(8))
    counts.put((decoding.times, right))


def test_processes_at_once_decode_each_shard_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, counts = context.Barrier(3), context.Queue()
    processes = [context.Process(target=_counted, args=(tmp_path, barrier, counts)) for _ in range(3)]
    for process in processes:
        process.start()
    found = [counts.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sum(times for times, _ in found) == 8
    assert all(right for _, right in found)


@pytest.mark.parametrize(
    ("told", "limit"), [("0", 0), ("123", 123), ("5M", 5 << 20), ("7K", 7 << 10), (" 2g ", 2 << 30)]
)
def test_the_limit_is_told_by_the_environment(told: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, told)
    assert shared_limit() == limit


@pytest.mark.parametrize("told", ["-1", "5T", "much", "1e9"])
def test_a_limit_that_is_no_size_is_refused(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, told)
    with pytest.raises(RecipeError, match=r"which is no size\. Fix: a number of bytes, or one with K, M or G, as 8G"):
        shared_limit()


def test_the_folder_is_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "5M")
    assert shared_shards(tmp_path / "nothing") is None
    assert shared_shards(tmp_path) is not None
    [folder] = tmp_path.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o755)
    assert shared_shards(tmp_path) is None
    folder.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "elsewhere")
    assert shared_shards(tmp_path) is None


def test_the_last_process_to_end_removes_all(tmp_path: Path) -> None:
    script = """
        import sys
        from pathlib import Path
        import numpy as np
        from logitcache.store.shared_memory import shared_shards
        shared_shards(Path(sys.argv[1])).get(sys.argv[2], (2,), np.dtype("u1"), lambda: np.zeros(2, "u1"))
        print("ready", flush=True)
        sys.stdin.read()
    """

    def start(name: str) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path), name]
        environment = os.environ | {VARIABLE: "5M"}
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)

    with start("a") as one, start("b") as other:
        for process in (one, other):
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
        [folder] = tmp_path.iterdir()
        one.communicate()
        assert files(folder) == {"a", "b"}
        other.communicate()
        assert files(folder) == set()


def test_a_packed_cache_is_read_alike_with_shared_memory_and_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = made(tmp_path / "c.zarr", ENCODINGS["packed"], shard_rows=100)
    keys = [ViewKey(view, index) for view in (1, 0) for index in range(0, 300, 7)]
    found = []
    for told in ("0", "5M", "5M"):
        monkeypatch.setenv(VARIABLE, told)
        found.append(open_cache(cache.path).rows(keys)["t"].logits)
    assert (found[0] == found[1]).all()  # type: ignore[union-attr]
    assert (found[0] == found[2]).all()  # type: ignore[union-attr]


def test_the_rest_of_a_view_and_the_next_are_decoded_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "0")
    cache: Cache = made(tmp_path / "c.zarr", ENCODINGS["packed"], shard_rows=100)
    cache.rows([ViewKey(1, 299)])
    source: Any = cache._stored._sources["t.logits"]
    source._thread.shutdown(wait=True)
    assert sorted(source._decoded) == list(range(6))


def test_a_fork_decodes_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "0")
    cache = made(tmp_path / "c.zarr", ENCODINGS["packed"], shard_rows=100)
    expected = cache.rows([ViewKey(0, 5)])["t"].logits
    child = os.fork()
    if child == 0:
        os._exit(0 if (cache.rows([ViewKey(0, 5)])["t"].logits == expected).all() else 1)  # type: ignore[union-attr]
    assert os.waitpid(child, 0)[1] == 0
