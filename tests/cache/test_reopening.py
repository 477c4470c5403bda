"""What an earlier opening found is used again only while no file has changed, and never by what verifies or writes."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from logitcache.cache import snapshot
from logitcache.cache.cache import open_cache
from logitcache.cache.format.metadata import skeleton_limits
from logitcache.errors import CacheError
from logitcache.store import digest_index
from logitcache.store.files import user_cache_directory
from tests.cache.made import COUNT, TRANSFORM, Pixels, flip, run, teacher, verified

RECORDS = "t.logits.commits"
RECORD = f"{RECORDS}/c.1.1.0.0"


@pytest.fixture(autouse=True)
def many(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the records of six shards be many, for a user who has opened nothing yet."""
    monkeypatch.setattr(snapshot, "FEW", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an hour pass since the files were written."""
    now = digest_index.now_ns
    monkeypatch.setattr(digest_index, "now_ns", lambda: now() + 3_600_000_000_000)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect what is read: groups of commit records, and the skeleton."""
    found: list[str] = []
    records, problems = snapshot.read_records, snapshot.skeleton_problems

    def records_read(store, layout, group, known=None):
        if known is None:  # else they are remembered
            found.append(group.name)
        return records(store, layout, group, known)

    def skeleton_read(store, manifest):
        found.append("skeleton")
        return problems(store, manifest)

    monkeypatch.setattr(snapshot, "read_records", records_read)
    monkeypatch.setattr(snapshot, "skeleton_problems", skeleton_read)
    return found


def test_an_unchanged_cache_is_not_read_again(cache: Path, later: None, read: list[str]) -> None:
    first = open_cache(cache).snapshot
    assert sorted(read) == ["skeleton", "t.logits"]
    read.clear()
    again = open_cache(cache).snapshot
    assert read == []
    assert again.shards == first.shards
    for name, records in first.records.items():
        assert [records.of(number) for number in range(6)] == [again.records[name].of(number) for number in range(6)]


def test_a_cache_that_changed_just_now_is_read_again(
    cache: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = max((cache / RECORDS).stat().st_mtime_ns, (cache / RECORDS).stat().st_ctime_ns)
    monkeypatch.setattr(digest_index, "now_ns", lambda: written + 1_900_000_000)
    for _ in range(2):
        open_cache(cache)
        assert sorted(read) == ["skeleton", "t.logits"]
        read.clear()


def _replaced(root: Path) -> None:
    data = (root / RECORD).read_bytes()
    (root / "new").write_bytes(data)
    os.replace(root / "new", root / RECORD)


def _copied(root: Path) -> None:
    shutil.copytree(root, root.with_name("copy"))
    shutil.rmtree(root)
    root.with_name("copy").rename(root)


@pytest.mark.parametrize(
    "change",
    [
        _replaced,
        _copied,
        lambda root: (root / RECORDS / "c.7.0.0.0").write_bytes(b""),
        lambda root: (root / RECORDS / "zarr.json").touch(),
        lambda root: [file.write_bytes(b"x") for file in user_cache_directory().glob("*.records")],  # type: ignore[union-attr]
        lambda root: shutil.rmtree(user_cache_directory()),  # type: ignore[arg-type]
    ],
    ids=["replaced", "copied", "added", "touched", "damaged memory", "no memory"],
)
def test_what_has_changed_is_read_again(
    change: Callable[[Path], object], cache: Path, later: None, read: list[str]
) -> None:
    open_cache(cache)
    read.clear()
    change(cache)
    open_cache(cache)
    assert "t.logits" in read


def test_names_count_where_a_file_system_stamps_no_folders(cache: Path, later: None) -> None:
    folder = cache / RECORDS
    open_cache(cache)
    memory, before = digest_index.stamp, digest_index.stamp(folder.lstat())
    (cache / RECORD).unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digest_index, "stamp", lambda status: before if status.st_ino == before[3] else memory(status))
        with pytest.raises(CacheError, match="is incomplete: 1 of 6 shards are not committed"):
            open_cache(cache)


def test_a_record_changed_in_place_changes_no_rows_and_is_damage_to_verify(cache: Path, later: None) -> None:
    open_cache(cache)
    flip(cache / RECORD, 20)
    open_cache(cache).require_intact()  # every shard is what its record said
    assert [text for text in verified(cache) if "view 1 rows 128..256" in text]


def test_records_that_are_damaged_are_not_remembered(cache: Path, later: None, read: list[str]) -> None:
    os.truncate(cache / RECORD, 39)
    for _ in range(2):
        read.clear()
        with pytest.raises(CacheError, match="does not have"):
            open_cache(cache)
        assert "t.logits" in read


def test_a_changed_byte_of_any_file_of_the_skeleton_is_found_after_it_was_sound(
    tmp_path: Path, later: None, read: list[str]
) -> None:
    cache = tmp_path / "c.zarr"
    run(cache, Pixels(COUNT), teachers={"t": teacher(TRANSFORM)}, shard_rows=128)
    keys = skeleton_limits(open_cache(cache).manifest)
    assert {"zarr.json", "label/c/0", "digest/c/0", "canary/c/0/0/0/0", f"{RECORDS}/zarr.json"} < set(keys)
    assert any(key.endswith("/c/0/0") and key.startswith("t.logits.") for key in keys)  # a table
    for key in keys:
        open_cache(cache)
        read.clear()
        flip(cache / key, (cache / key).stat().st_size // 2)
        with pytest.raises(CacheError):
            open_cache(cache)
        flip(cache / key, (cache / key).stat().st_size // 2)
    read.clear()
    open_cache(cache)
    assert "skeleton" in read


def test_a_folder_of_records_that_becomes_a_link_is_refused(cache: Path, later: None, tmp_path: Path) -> None:
    open_cache(cache)
    (cache / RECORDS).rename(tmp_path / "elsewhere")
    (cache / RECORDS).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CacheError, match="no link in a cache is followed"):
        open_cache(cache)
