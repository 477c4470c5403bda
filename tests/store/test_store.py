"""One contract for all stores: a folder, and mirrors of object storage, of a web server and of fsspec's memory."""

import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import fsspec
import pytest

from logitcache.cache.format.root import ROOT
from logitcache.cache.snapshot import Snapshot, locate
from logitcache.cli import main
from logitcache.errors import CacheError, RecipeError
from logitcache.store.base import Store
from logitcache.store.file_locks import PART
from logitcache.store.mirrors_folder import FOLDER
from logitcache.store.shards import StoredShard
from tests.cache.elsewhere import change, flipped, new_url, upload
from tests.cache.made import contents
from tests.objects import bucket, website

EVIL = ("../x", "/x", "a//b", "a/./b", "a/../../x", "", "a\0b", "a\\..\\b", "a/", "\ud800", "a/\x1b[2J")
RECORD = "t.logits.commits/c.0.1.0.0"


@dataclass
class Place:
    """A sound cache somewhere: its location, and how its bytes are changed there past the store."""

    location: str
    change: Callable[[str, Callable[[bytes], bytes]], None]
    remove: Callable[[str], None]

    def store(self) -> Store:
        """Open the store as another process does."""
        return locate(self.location)

    def parts(self) -> list[StoredShard]:
        snapshot = Snapshot.read(self.store())
        groups = snapshot.layout.groups
        return [part for group in groups for shard in snapshot.shards for part in snapshot.stored(group, shard)]


@contextmanager
def in_folder(cache: Path) -> Iterator[Place]:
    def change(key: str, edit: Callable[[bytes], bytes]) -> None:
        (cache / key).write_bytes(edit((cache / key).read_bytes()))

    yield Place(str(cache), change, lambda key: (cache / key).unlink())


@contextmanager
def on_web_server(cache: Path) -> Iterator[Place]:
    with website(cache.parent, READ_SECONDS=20) as front, in_folder(cache) as folder:
        yield replace(folder, location=f"{front.url}/{cache.name}")


@contextmanager
def in_bucket(cache: Path) -> Iterator[Place]:
    with bucket(READ_SECONDS=20) as served:
        yield Place(
            served.fill("c.zarr", contents(cache)),
            lambda key, edit: served.put(f"c.zarr/{key}", edit(served.get(f"c.zarr/{key}"))),
            lambda key: served.remove(f"c.zarr/{key}"),
        )


@contextmanager
def in_memory(cache: Path) -> Iterator[Place]:
    url = new_url()
    upload(cache, url)
    yield Place(
        url, lambda key, edit: change(url, key, edit), lambda key: fsspec.filesystem("memory").rm(f"{url}/{key}")
    )


STORES: dict[str, Callable[[Path], AbstractContextManager[Place]]] = {
    "folder": in_folder,
    "s3": in_bucket,
    "web": on_web_server,
    "memory": in_memory,
}
"""Every store, by name: a function that puts a copy of the sound cache there. A new store joins the tests by a line."""

READ_ONLY = {"web"}


@pytest.fixture(params=STORES)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def place(kind: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setenv(FOLDER, str(tmp_path / "mirrors"))
    with STORES[kind](cache) as found:
        yield found


def test_files_are_read_within_bounds(place: Place, sound: Path) -> None:
    store = place.store()
    for key in (ROOT, "label/c/0", RECORD):
        data = (sound / key).read_bytes()
        assert store.read(key) == store.read(key, len(data)) == data
        assert store.exists(key)
        assert store.holds(key, data)
        assert not store.holds(key, flipped(data))
        with pytest.raises(CacheError, match=f"has {len(data)} bytes, {len(data) - 1} at most are expected. Fix:"):
            store.read(key, len(data) - 1)
    for key in ("absent", "label/absent"):
        assert not store.exists(key)
        assert not store.holds(key, b"")
        with pytest.raises(FileNotFoundError):
            store.read(key)


def test_a_file_that_is_larger_than_expected_is_not_kept(place: Place) -> None:
    place.change("label/c/0", lambda data: data * 100)
    with pytest.raises(CacheError, match=r"at most are expected|bytes"):
        place.store().read("label/c/0", 5000)


def test_keys_that_lead_out_are_refused(place: Place, tmp_path: Path) -> None:
    store = place.store()
    before = contents(tmp_path)
    for key in EVIL:
        for act in (store.read, store.exists, lambda key: store.write(key, b"x"), lambda key: store.remove([key])):
            with pytest.raises(CacheError, match="names no file inside"):
                act(key)
    assert contents(tmp_path) == before


def test_what_is_written_is_seen_by_others_and_removed_for_all(kind: str, place: Place) -> None:
    store = place.store()
    if kind in READ_ONLY:
        for act in (lambda: store.write("digest/new", b"data"), lambda: store.remove([ROOT]), store.sizes):
            with pytest.raises(RecipeError, match="a web server only hands out what is named"):
                act()
        assert store.exists(ROOT)
        return
    for data in (b"data", b"other data", b""):
        store.write("digest/new", data)
        assert store.read("digest/new") == place.store().read("digest/new") == data
    assert store.sizes()["digest/new"] == 0
    store.remove(["digest/new", "digest/absent"])
    for seen in (store, place.store()):
        assert not seen.exists("digest/new")
        assert "digest/new" not in seen.sizes()


def test_sizes_are_those_of_all_files(kind: str, place: Place, sound: Path) -> None:
    store, expected = place.store(), {key: len(data) for key, data in contents(sound).items()}
    if kind not in READ_ONLY:
        assert store.sizes() == expected
    assert store.stored_bytes() == sum(expected.values())


def test_shards_are_those_of_their_records(place: Place, sound: Path) -> None:
    parts, store = place.parts(), place.store()
    assert [part.array for part in parts] == ["t.logits", "t.logits.errors"] * 6
    assert store.wrong(parts, fresh=False) == store.wrong(parts, fresh=True) == [None] * len(parts)
    store.ensure((), ahead=parts[:1])
    store.ensure(parts)
    for part in parts:
        expected = (sound / part.key).read_bytes()
        descriptor = store.open(part)
        try:
            assert os.pread(descriptor, len(expected) + 1, 0) == expected
        finally:
            os.close(descriptor)
        assert store.read_shard(part) == expected


@pytest.mark.parametrize("edit", [flipped, lambda data: data[:-1], lambda data: b""], ids=["bit", "short", "empty"])
def test_a_shard_that_is_not_of_its_record_is_refused(place: Place, edit: Callable[[bytes], bytes]) -> None:
    parts = place.parts()
    place.change(parts[1].key, edit)
    store = place.store()
    assert [number for number, text in enumerate(store.wrong(parts, fresh=True)) if text] == [1]
    for act in (store.open, store.read_shard):
        with pytest.raises(CacheError, match="its record"):
            act(parts[1])
    assert store.read_shard(parts[0])


def test_no_more_of_a_shard_is_read_than_its_record_says(place: Place, sound: Path) -> None:
    part = place.parts()[1]
    place.change(part.key, lambda data: data + b"more")
    store = place.store()
    if store.is_local:
        with pytest.raises(CacheError, match="its record"):
            store.read_shard(part)
    else:  # a mirror asks for just these bytes
        assert store.read_shard(part) == (sound / part.key).read_bytes()


def test_a_shard_that_is_gone_is_an_error(place: Place) -> None:
    parts = place.parts()
    place.remove(parts[1].key)
    store = place.store()
    assert [number for number, text in enumerate(store.wrong(parts, fresh=True)) if text] == [1]
    for act in (store.open, store.read_shard):
        with pytest.raises((CacheError, FileNotFoundError)):
            act(parts[1])


def test_a_store_is_pickled_as_its_location(kind: str, place: Place) -> None:
    parts, store = place.parts(), place.store()
    store.ensure(parts)
    data = pickle.dumps(store)
    assert len(data) < 1000
    again = pickle.loads(data)
    assert type(again) is type(store)
    assert (str(again), again.path, again.is_local, again.limit) == (
        str(store),
        store.path.absolute(),
        kind == "folder",
        store.limit,
    )
    assert again.read(ROOT) == store.read(ROOT)
    assert again.read_shard(parts[0]) == store.read_shard(parts[0])


@pytest.mark.parametrize("command", ["inspect", "verify", "gc", "summary"])
def test_evil_keys_in_a_bucket_write_nothing_outside(
    command: str, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path / "mirrors"))
    below = "c.zarr"
    evil = ("evil/t.logits.commits/../../../../x/c.0.0.0.0", "t.logits.commits/../../c.0.0.0.0", "/x/c.0.0.0.0", "../x")
    with bucket(READ_SECONDS=20) as served:
        url = served.fill(below, contents(sound))
        served.fill(below, dict.fromkeys(evil, b"x" * 40))
        assert len(served.keys(f"{below}/")) == len(contents(sound)) + len(evil)
        assert main([command, url]) in (0, 3)
    [mirror] = (tmp_path / "mirrors").iterdir()
    assert [path.name for path in tmp_path.iterdir()] == ["mirrors"]
    # Prefetching goes on behind the command: what is being written has a name of its own until it is whole.
    found = (file.relative_to(mirror / below).as_posix() for file in (mirror / below).rglob("*") if not file.is_dir())
    assert {name.removesuffix(PART) for name in found} <= set(contents(sound))
