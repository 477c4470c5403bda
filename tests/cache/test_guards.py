"""What is read of a cache is bounded, stays inside it, and belongs to the cache that was opened."""

import os
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from logitcache.cache.cache import Cache, open_cache
from logitcache.cache.snapshot import Snapshot, locate, open_snapshot
from logitcache.cli import main
from logitcache.errors import CacheError
from logitcache.store.local import LocalStore
from logitcache.store.mirrors_folder import FOLDER
from logitcache.store.remote.client import Remote
from logitcache.store.safe_files import inside, parse_json
from logitcache.views.keys import ViewKey
from tests.cache.elsewhere import change, new_url, objects, upload
from tests.cache.made import DENSE16, PACKED, Pixels, contents, raw, run, teacher
from tests.memory import taking_at_most

EVIL = ["../x", "/etc/x", "a//b", "a/./b", "a/../../x", "", "a\0b", "a\\..\\b", "a/", "a\n", "\ud800", "a/\x1b[2J"]


@pytest.mark.parametrize("key", EVIL)
def test_a_key_that_leads_out_is_joined_by_nobody(key: str, cache: Path, tmp_path: Path) -> None:
    store, before = LocalStore(cache), contents(tmp_path)
    for act in (lambda: inside(cache, key), lambda: store.read(key), lambda: store.write(key, b"x")):
        with pytest.raises(CacheError, match="names no file inside"):
            act()
    with pytest.raises(CacheError, match="names no file inside"):
        store.remove([key])
    assert contents(tmp_path) == before


def test_a_folder_that_is_a_link_is_not_entered(cache: Path, tmp_path: Path) -> None:
    (cache / "label").rename(tmp_path / "elsewhere")
    (cache / "label").symlink_to(tmp_path / "elsewhere")
    store = LocalStore(cache)
    for act in (lambda: store.read("label/c/0"), lambda: store.write("label/c/0", b"x")):
        with pytest.raises(CacheError, match="no link in a cache is followed"):
            act()
    assert main(["inspect", str(cache)]) == 3


def _sparse(file: Path) -> None:
    with open(file, "wb") as opened:
        opened.truncate(1 << 40)


def _nested(file: Path) -> None:
    file.write_bytes(b'{"attributes": [' + b"[]," * (5 << 20) + b"1]}")


def _fifo(file: Path) -> None:
    os.mkfifo(file)


def _zeros(file: Path) -> None:
    file.symlink_to("/dev/zero")


def _folder(file: Path) -> None:
    file.mkdir()


@pytest.mark.parametrize("hostile", [_sparse, _nested, _fifo, _zeros, _folder])
@pytest.mark.parametrize("key", ["zarr.json", "t.logits/zarr.json", "label/c/0", "t.logits.commits/c.0.0.0.0"])
def test_hostile_files_are_refused_at_once_by_every_command(
    key: str, hostile: Callable[[Path], None], cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (cache / key).unlink()
    hostile(cache / key)
    began = time.process_time()
    with taking_at_most(300 << 20):
        with pytest.raises(CacheError):
            open_cache(cache)
        for command in ("inspect", "verify", "gc", "summary"):
            # What a command does not read does not trouble it.
            assert main([command, str(cache)]) in ((3,) if key == "zarr.json" or command == "verify" else (0, 3))
    assert time.process_time() - began < 5
    assert "this is a bug" not in capsys.readouterr().err


@pytest.mark.parametrize("data", [b'{"a": ' * 100_000, b"[" * 300_000, b"[]," * 300_000, b"{}" * 200_001, b"\xff"])
def test_json_of_too_many_parts_is_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_json(data)


@pytest.mark.parametrize("answer", [b"", b"<html>not found</html>", bytes(40), bytes(41), b"\xff" * 40])
def test_an_answer_that_is_no_record_commits_nothing(
    answer: bytes, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path / "mirrors"))
    url = new_url()
    upload(sound, url)
    change(url, "t.logits.commits/c.0.1.0.0", lambda _: answer)
    assert len(open_snapshot(url).shards) == 5
    with pytest.raises(CacheError, match=r"rows 128\.\.256: the commit record .* is damaged"):
        open_cache(url)
    assert main(["verify", url]) == 3


def rows_of(cache: Cache, view: int) -> np.ndarray:  # type: ignore[type-arg]
    return raw(cache.answers([ViewKey(view, index) for index in range(len(cache))])["t"].logits)[0]


@pytest.mark.parametrize("logits", [DENSE16, PACKED], ids=["hot", "packed"])
@pytest.mark.parametrize("remote", [False, True], ids=["folder", "url"])
def test_a_cache_that_is_replaced_under_a_reader_is_never_mixed_with_it(
    logits: dict[str, str], remote: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path / "mirrors"))
    monkeypatch.setattr("logitcache.store.download.Prefetcher.start", lambda self, parts: list(parts))
    one, other = tmp_path / "one.zarr", tmp_path / "other.zarr"
    for path, seed in ((one, 0), (other, 1)):
        run(path, Pixels(300, seed=seed), teachers={"t": teacher(logits)}, shard_rows=128)
    expected, where = rows_of(open_cache(one), 1), str(one)
    if remote:
        where = new_url()
        upload(one, where)
    reader = open_cache(where)
    rows_of(reader, 0)
    again = pickle.loads(pickle.dumps(reader.snapshot))
    if remote:
        Remote(where).remove(objects(where))
        upload(other, where)
    else:
        one.rename(tmp_path / "aside")
        shutil.copytree(other, one)
    for cache in (reader, Cache(again)):
        try:
            assert np.array_equal(rows_of(cache, 1), expected)
        except CacheError as error:
            assert "is damaged" in str(error)  # noqa: PT017
    assert np.array_equal(rows_of(open_cache(where), 1), rows_of(open_cache(other), 1))


def test_shared_memory_gives_no_rows_of_another_cache(tmp_path: Path) -> None:
    """The shards of a cache are replaced by another's, records aside: a reader of either sees its own or an error."""
    paths = [tmp_path / "one.zarr", tmp_path / "other.zarr"]
    for seed, path in enumerate(paths):
        run(path, Pixels(300, seed=seed), teachers={"t": teacher(PACKED)}, shard_rows=128)
    victim = open_cache(paths[0])
    poisoned = tmp_path / "poisoned.zarr"
    shutil.copytree(paths[0], poisoned)
    snapshot = open_snapshot(poisoned)
    for file in (paths[1] / "t.logits").glob("c.*"):
        shutil.copy(file, poisoned / "t.logits" / file.name)
    with pytest.raises(CacheError, match="is damaged"):
        rows_of(Cache(snapshot), 0)
    assert np.array_equal(rows_of(victim, 0), rows_of(Cache(Snapshot.read(locate(paths[0]))), 0))
