"""Copies of caches share a folder of a limited size: what was not used the longest goes first."""

import fcntl
import os
import signal
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from logitcache.cache.snapshot import locate
from logitcache.errors import CacheError, RecipeError
from logitcache.store.bounded_folder import BoundedFolder
from logitcache.store.file_locks import PART, locked_partial
from logitcache.store.local import LocalStore
from logitcache.store.mirror import Mirror, mirror_of
from logitcache.store.mirrors_folder import FOLDER, USED, mirrored_shards, mirrors_folder
from logitcache.store.remote.client import Remote
from logitcache.store.shards import Shard, StoredShard, is_shard

SIZE = 100


def shard(folder: Path, cache: str, view: int, age: float, array: str = "t.logits") -> Path:
    """Leave a shard that was brought so many seconds ago."""
    file = folder / cache / "c.zarr" / array / f"c.{view}.0.0"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(bytes(SIZE))
    os.utime(file, (1e9 - age, 1e9 - age))
    return file


def use(folder: Path, cache: str, view: int, age: float) -> None:
    file = folder / cache / USED / str(view)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    os.utime(file, (1e9 - age, 1e9 - age))


def bounded(path: Path, limit: int) -> BoundedFolder:
    return BoundedFolder(path, limit, mirrored_shards)


def make(folder: BoundedFolder, size: int) -> None:
    with folder.reserved(size):
        pass


def test_the_least_recently_used_of_all_caches_go_first(tmp_path: Path) -> None:
    old, used, new = shard(tmp_path, "a", 0, 30), shard(tmp_path, "a", 1, 40), shard(tmp_path, "b", 0, 10)
    use(tmp_path, "a", 1, 5)
    make(bounded(tmp_path, 3 * SIZE), SIZE)
    assert [file.exists() for file in (old, used, new)] == [False, True, True]
    make(bounded(tmp_path, 3 * SIZE), 2 * SIZE)
    assert [file.exists() for file in (old, used, new)] == [False, True, False]


def test_nothing_goes_where_there_is_room_and_small_files_stay_in_any_case(tmp_path: Path) -> None:
    shards = [shard(tmp_path, "a", view, view) for view in range(3)]
    record = shard(tmp_path, "a", 0, 99, "t.logits.commits")
    label = tmp_path / "a" / "c.zarr" / "label" / "c" / "0"
    label.parent.mkdir(parents=True)
    label.write_bytes(bytes(9 * SIZE))
    make(bounded(tmp_path, 4 * SIZE), SIZE)
    assert all(file.exists() for file in shards)
    make(bounded(tmp_path, 4 * SIZE), 4 * SIZE)
    assert not any(file.exists() for file in shards)
    assert record.exists()
    assert label.exists()


def test_what_is_promised_and_not_yet_written_counts(tmp_path: Path) -> None:
    first = shard(tmp_path, "a", 0, 9)
    folder = bounded(tmp_path, 3 * SIZE)
    with folder.reserved(SIZE), folder.reserved(SIZE):
        assert first.exists()
        with folder.reserved(SIZE):
            assert not first.exists()


def test_threads_that_write_at_once_take_no_more_than_the_limit(tmp_path: Path) -> None:
    """Each waits for room that the others' files leave once they are written."""
    folder, most, array = bounded(tmp_path, 3 * SIZE), list[int](), tmp_path / "a" / "c.zarr" / "t.logits"
    array.mkdir(parents=True)

    def size(file: Path) -> int:
        with suppress(FileNotFoundError):  # evicted meanwhile
            return file.stat().st_size
        return 0

    def write(view: int) -> None:
        with folder.reserved(SIZE + view):
            (array / f"c.{view}.0.0").write_bytes(bytes(SIZE + view))
            most.append(sum(map(size, array.iterdir())))

    threads = [threading.Thread(target=write, args=[view], daemon=True) for view in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(most) == 16
    assert max(most) <= 3 * SIZE


def test_a_fork_waits_for_no_thread_of_its_parent(tmp_path: Path) -> None:
    folder = bounded(tmp_path, SIZE)
    with folder.reserved(SIZE):
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            make(folder, SIZE)
            os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_what_killed_processes_were_writing_is_removed_and_what_living_ones_write_is_kept(tmp_path: Path) -> None:
    dead, alive = (shard(tmp_path, "a", view, 9) for view in (0, 1))
    dead.rename(dead.with_name(dead.name + PART))
    alive.unlink()
    with locked_partial(alive) as part:
        make(bounded(tmp_path, 3 * SIZE), 3 * SIZE)
        part.finish(b"whole")
    assert os.listdir(alive.parent) == [alive.name]
    assert alive.read_bytes() == b"whole"


def test_a_part_that_is_not_finished_leaves_nothing_and_is_nobodys_afterwards(tmp_path: Path) -> None:
    with pytest.raises(KeyError), locked_partial(tmp_path / "file"):
        raise KeyError
    assert os.listdir(tmp_path) == []
    with locked_partial(tmp_path / "file") as part:
        part.finish(b"1")
        descriptor = os.open(tmp_path / "file", os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)
    assert os.listdir(tmp_path) == ["file"]


def test_a_shard_larger_than_all_the_room_is_refused(tmp_path: Path) -> None:
    large = StoredShard("t.logits/c.0.0.0", Shard(0, 0, 1), (101).to_bytes(8, "little") + bytes(32), 1, 0, bool)
    with pytest.raises(CacheError, match=r"101 bytes does not fit .*LOGITCACHE_LOCAL_COPY_SIZE=101 or more"):
        Mirror(Remote("memory://a/c.zarr"), tmp_path / "a" / "c.zarr", bounded(tmp_path, 100)).ensure([large])


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("t.logits/c.0.12.0", True),
        ("t.logits.errors/c.3.0.0", True),
        ("views.crc32/c.1.2", True),
        ("t.logits.commits/c.0.0.0.0", False),
        ("t.logits/zarr.json", False),
        ("label/c/0", False),
        ("t.logits.basis/c/0/0", False),
        ("zarr.json", False),
    ],
)
def test_shards_are_told_from_what_a_copy_must_keep(key: str, expected: bool) -> None:
    assert is_shard(key) is expected


def test_without_a_home_only_caches_at_urls_need_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv(FOLDER, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert isinstance(locate(tmp_path / "c.zarr"), LocalStore)
    with pytest.raises(RecipeError, match=f"no home directory .*Fix: {FOLDER}="):
        mirror_of("memory://a/c.zarr")
    monkeypatch.setenv(FOLDER, str(tmp_path / "copies"))
    assert mirrors_folder().path == tmp_path / "copies"


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(FOLDER, str(tmp_path / "file" / "copies"))
    with pytest.raises(CacheError, match=f"copies cannot be used: Not a directory. Fix: {FOLDER}="):
        mirror_of("memory://a/c.zarr")
