"""Whole writes and remembered digests."""

import errno
import hashlib
import os
import pickle
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitcache.errors import CacheError, DataError, LogitCacheError
from logitcache.store import digest_index
from logitcache.store.digest_index import SHA256, remembered
from logitcache.store.files import remove_leftovers, write_atomically
from logitcache.views.shared_arrays import SharedArrays


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    return home


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an hour pass since the files were written."""
    now = digest_index.now_ns
    monkeypatch.setattr(digest_index, "now_ns", lambda: now() + 3_600_000_000_000)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect the names of the files whose bytes are read."""
    names: list[str] = []
    read = digest_index._measured_rows

    def spy(block, measure, what, error):
        names.extend(os.path.basename(name) for name in block)
        return read(block, measure, what, error)

    monkeypatch.setattr(digest_index, "_measured_rows", spy)
    return names


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / name for name in ("a.bin", "b.bin", "deep/c.bin")]
    for number, path in enumerate(paths):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes([number]) * (100 + number))
    return paths


def file_digests(paths: list[Path], **options: Any) -> list[bytes]:
    return [digest.tobytes() for digest in remembered(paths, SHA256, **options)]


def sha256(paths: list[Path]) -> list[bytes]:
    return [hashlib.sha256(path.read_bytes()).digest() for path in paths]


def test_digests_are_the_sha256_of_the_bytes_in_the_order_asked(three: list[Path]) -> None:
    assert file_digests(three[::-1], what="shard") == sha256(three[::-1])
    assert file_digests([], what="shard") == []


@pytest.mark.usefixtures("later")
def test_second_run_reads_only_what_changed(three: list[Path], hashed: list[str]) -> None:
    file_digests(three, what="shard")
    hashed.clear()
    assert file_digests(three, what="shard") == sha256(three)
    assert hashed == []
    three[1].write_bytes(b"other")
    assert file_digests(three, what="shard") == sha256(three)
    assert hashed == ["b.bin"]


@pytest.mark.usefixtures("later")
def test_what_is_asked_for_is_remembered_however_large_the_folder(
    three: list[Path], hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest_index, "_MOST_ROWS", 2)
    file_digests(three, what="shard")
    three[1].write_bytes(b"other")
    for expected in (["b.bin"], []):
        hashed.clear()
        file_digests(three, what="shard")
        assert hashed == expected


@pytest.mark.usefixtures("later")
def test_files_are_handled_some_at_a_time(tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_SPAN", "_BLOCK", "_MERGED_ROWS"):
        monkeypatch.setattr(digest_index, name, 3)
    paths = [tmp_path / f"{number}.bin" for number in range(20)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes(number))
    assert file_digests(paths[:11], what="shard") == sha256(paths[:11])
    for number in (0, 5, 10):
        paths[number].write_bytes(b"other")
    hashed.clear()
    assert file_digests(paths, what="shard") == sha256(paths)
    assert hashed == [f"{number}.bin" for number in (0, 5, *range(10, 20))]
    hashed.clear()
    found = remembered(paths, SHA256, what="shard", width=5)
    assert [row.tobytes() for row in found] == [digest[:5] for digest in sha256(paths)]
    assert hashed == []


@pytest.mark.usefixtures("later")
def test_change_that_restores_size_and_mtime_is_noticed(three: list[Path]) -> None:
    file_digests(three, what="shard")
    before = three[0].stat()
    three[0].write_bytes(b"\xff" * before.st_size)
    os.utime(three[0], ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file_digests(three, what="shard") == sha256(three)


def test_file_just_written_is_never_remembered(three: list[Path], hashed: list[str]) -> None:
    file_digests(three, what="shard")
    hashed.clear()
    file_digests(three, what="shard")
    assert len(hashed) == 3


@pytest.mark.usefixtures("later")
def test_file_dated_in_the_future_is_never_remembered(three: list[Path], hashed: list[str]) -> None:
    os.utime(three[0], (4e9, 4e9))
    file_digests(three, what="shard")
    hashed.clear()
    file_digests(three, what="shard")
    assert hashed == ["a.bin"]


@pytest.mark.usefixtures("later")
def test_fresh_reads_every_byte_again(three: list[Path], hashed: list[str]) -> None:
    file_digests(three, what="shard")
    hashed.clear()
    assert file_digests(three, what="shard", fresh=True) == sha256(three)
    assert len(hashed) == 3


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "folder"])
def test_damaged_index_costs_time_and_nothing_else(
    three: list[Path], hashed: list[str], home: Path, damage: str
) -> None:
    file_digests(three, what="shard")
    (index,) = home.rglob("*.stamps")
    data = bytearray(index.read_bytes())
    data[-5] ^= 1
    index.unlink()
    if damage == "folder":
        index.mkdir()
    else:
        index.write_bytes({"flip": data, "truncate": data[:-7], "empty": b""}[damage])
    hashed.clear()
    assert file_digests(three, what="shard") == sha256(three)
    assert len(hashed) == 3


@pytest.mark.usefixtures("later")
def test_cache_directory_that_cannot_be_made_is_done_without(
    three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(three[0] / "below a file"))
    assert file_digests(three, what="shard") == sha256(three)


@pytest.mark.usefixtures("later")
def test_another_selection_below_the_same_folder_keeps_what_is_known(three: list[Path], hashed: list[str]) -> None:
    file_digests(three[:2], what="shard")
    other = three[0].with_name("d.bin")
    other.write_bytes(b"d")
    file_digests([three[0], other], what="shard")
    hashed.clear()
    file_digests([three[1], other], what="shard")
    assert hashed == []


def test_file_that_is_missing_or_no_file_is_named(three: list[Path]) -> None:
    three[1].unlink()
    with pytest.raises(DataError, match=r"image '.*b\.bin' cannot be read: No such file"):
        file_digests(three, what="image")
    os.mkfifo(three[1])
    with pytest.raises(CacheError, match=r"b\.bin' is not a regular file"):
        file_digests(three, what="shard", error=CacheError)


def test_many_files_keep_their_order(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}" for number in range(700)]
    for path in paths:
        path.write_text(path.name)
    assert file_digests(paths, what="image") == sha256(paths)


@pytest.mark.parametrize("sync", [True, False])
def test_write_replaces_the_whole_file(tmp_path: Path, sync: bool) -> None:
    path = tmp_path / ("n" * 250)
    write_atomically(path, b"first and long", sync=sync)
    write_atomically(path, memoryview(b"second"), sync=sync)
    assert path.read_bytes() == b"second"
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk_keeps_the_old_file_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "manifest.json"
    path.write_bytes(b"old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CacheError, match=r"manifest\.json' cannot be written.*\n.*free space") as e:
        write_atomically(path, b"new")
    assert isinstance(e.value.__cause__, OSError)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def small_files() -> Iterator[int]:
    """Let this process write no file of more than a MiB."""
    limit, hard = 1 << 20, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard[1]))
    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, hard)


def test_a_limit_of_file_sizes_is_not_taken_for_a_full_disk(tmp_path: Path, small_files: int) -> None:
    path = tmp_path / "shard"
    write_atomically(path, bytes(small_files))
    with pytest.raises(CacheError, match=r"cannot be written: File too large.\n  Fix: .*ulimit -f.* not full") as e:
        write_atomically(path, bytes(small_files + 1))
    assert "free space" not in str(e.value)
    assert list(tmp_path.iterdir()) == [path]


def test_a_limit_of_file_sizes_is_named_for_what_worker_processes_share(small_files: int) -> None:
    with pytest.raises(LogitCacheError, match=r"worker processes share(.|\n)*Fix: .*ulimit -f"):
        pickle.dumps(SharedArrays(np.zeros(2 * small_files, np.uint8)))


def test_write_into_a_missing_folder_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="cannot be written: No such file"):
        write_atomically(tmp_path / "none" / "x", b"")


def test_leftovers_of_killed_writers_are_removed_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / "c" / "0"
    deep.mkdir(parents=True)
    (deep / "1").write_bytes(b"shard")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda source, target: None)
        write_atomically(deep / "2", b"half")
    (leftover,) = remove_leftovers(tmp_path)
    assert leftover.name.startswith("2.")
    assert [path.name for path in deep.iterdir()] == ["1"]
