"""A cache from anywhere is data: whatever its bytes are, opening it works or is a CacheError, soon and in little."""

import copy
import hashlib
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from logitcache.cache.cache import Cache, open_cache
from logitcache.cache.format.layout import MAX_BYTES, layout_of, require_possible
from logitcache.cache.format.manifest import parse_manifest
from logitcache.cache.snapshot import open_snapshot
from logitcache.errors import CacheError
from logitcache.stage_one.precompute import precompute
from logitcache.store.safe_files import MAX_METADATA_BYTES
from logitcache.views.keys import ViewKey
from tests.cache.made import COUNT, PACKED, TOP2, Linear, Pixels, contents, recipe, teacher
from tests.memory import taking_at_most

NUM_FLIPS = 200
MEMORY = 128 << 20
FUZZED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
VALUES = (
    st.none()
    | st.booleans()
    | st.integers(-(10**3), 10**6)
    | st.sampled_from(
        [-1, 0, 2**31, 2**32 - 1, 2**63, 10**40, 1e308, 0.5, "", "../x", "/etc/passwd", "\0", "\ud800", "top_k"]
    )
    | st.text(max_size=6)
    | st.lists(st.integers(-1, 10**12), max_size=4)
    | st.dictionaries(st.sampled_from(["kind", "k", "size", "p", "a"]), st.integers() | st.text(max_size=4), max_size=3)
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a cache of everything: two teachers, hot and packed, checksums and parameters."""
    path = tmp_path_factory.mktemp("whole") / "c.zarr"
    teachers = {"t": teacher(PACKED), "u": teacher(TOP2)}
    full = recipe(path, teachers=teachers, shard_rows=1024, row_checksums=True, record_parameters=True)
    precompute(full, teachers={"t": Linear(), "u": Linear(7)}, dataset=Pixels(COUNT))
    return path


@pytest.fixture(scope="module")
def scratch(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to change and to restore."""
    return Path(shutil.copytree(whole, tmp_path_factory.mktemp("scratch") / "c.zarr"))


def opened(path: Path) -> Cache:
    """Open a cache in little memory."""
    with taking_at_most(MEMORY):
        return open_cache(path)


def test_the_guard_sees_what_is_given_back_at_once_and_nothing_of_before() -> None:
    assert len(b"x" * (2 * MEMORY)) > 0
    with taking_at_most(MEMORY):
        pass
    with pytest.raises(AssertionError), taking_at_most(MEMORY):
        assert len(b"x" * (2 * MEMORY)) > 0


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += places(item, (*path, key))
    return found


def changed(value: Any, data: st.DataObject, spots: list[tuple[Any, ...]]) -> Any:
    """Replace, remove or add something at one or two places of a JSON value."""
    value = copy.deepcopy(value)
    for _ in range(data.draw(st.integers(1, 2))):
        place = data.draw(st.sampled_from(spots))
        holder = value
        try:
            for key in place[:-1]:
                holder = holder[key]
            act = data.draw(st.sampled_from(["set", "set", "remove", "add"]))
            if act == "remove":
                del holder[place[-1]]
            elif act == "add" and isinstance(holder, list):
                holder.append(data.draw(VALUES))
            else:
                holder[place[-1] if act == "set" else "added"] = data.draw(VALUES)
        except (KeyError, IndexError, TypeError):
            continue  # the first change took the second's place away
    return value


@settings(FUZZED, max_examples=1500)
@given(data=st.data())
def test_a_fuzzed_manifest_is_refused_or_its_layout_is_possible(data: st.DataObject, whole: Path) -> None:
    manifest, spots = sound_manifest(whole)
    manifest = changed(manifest, data, spots)
    signed = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    try:
        with taking_at_most(MEMORY):
            parsed = parse_manifest(
                {"logitcache": {"format_version": 1, "manifest": manifest, "sha256": signed}}, "here"
            )
            require_possible(parsed, "here")
    except CacheError:
        return
    layout = layout_of(parsed)
    for array in layout.arrays:
        assert "/" not in array.name
        assert not array.name.startswith(".")
        assert array.num_views * array.num_images * array.row_bytes <= MAX_BYTES
        assert 0 < array.inner_rows <= array.shard_rows
    assert layout.num_shards > 0


_SOUND: list[tuple[Any, list[tuple[Any, ...]]]] = []


def sound_manifest(whole: Path) -> tuple[Any, list[tuple[Any, ...]]]:
    if not _SOUND:
        manifest = json.loads((whole / "zarr.json").read_bytes())["attributes"]["logitcache"]["manifest"]
        manifest["canaries"] = manifest["canaries"][:2]
        _SOUND.append((manifest, places(manifest)))
    return _SOUND[0]


@settings(FUZZED, max_examples=700)
@given(data=st.data())
def test_fuzzed_bytes_of_the_root_are_refused_or_mean_the_same(data: st.DataObject, whole: Path, scratch: Path) -> None:
    sound = (whole / "zarr.json").read_bytes()
    start = data.draw(st.integers(0, len(sound)))
    length = data.draw(st.sampled_from([0, 0, 1, 1, 7, 10**6]))
    stored = sound[:start] + data.draw(st.binary(max_size=4)) + sound[start + length :]
    (scratch / "zarr.json").write_bytes(stored)
    try:
        with taking_at_most(MEMORY):
            found = open_snapshot(scratch).manifest
        assert found == open_snapshot(whole).manifest
    except CacheError:
        pass
    finally:
        (scratch / "zarr.json").write_bytes(sound)


@settings(FUZZED, max_examples=80)
@given(data=st.data(), name=st.sampled_from(["t.logits", "u.logits", "u.logits.commits", "label", "views.crc32"]))
def test_fuzzed_metadata_of_an_array_is_refused(data: st.DataObject, name: str, whole: Path, scratch: Path) -> None:
    sound = (whole / name / "zarr.json").read_bytes()
    found = json.loads(sound)
    metadata = changed(found, data, places(found))
    (scratch / name / "zarr.json").write_text(json.dumps(metadata))
    try:
        if metadata == found:
            return
        with pytest.raises(CacheError):
            opened(scratch)
    finally:
        (scratch / name / "zarr.json").write_bytes(sound)


def test_flips_and_truncations_of_any_file_are_noticed(whole: Path, scratch: Path) -> None:
    generator = random.Random(0)
    sound = contents(whole)
    names = sorted(sound, key=lambda name: (not name.endswith("zarr.json"), name))
    for number in range(NUM_FLIPS):
        name = names[number % len(names)]
        data = bytearray(sound[name])
        offset = generator.randrange(len(data))
        if number // len(names) % 3:
            data[offset] ^= 1 << generator.randrange(8)
        else:
            del data[offset:]
        (scratch / name).write_bytes(data)
        try:
            opened(scratch)
        except CacheError:
            pass
        else:
            assert name.endswith("zarr.json"), (name, offset)
            assert json.loads(data) == json.loads(sound[name]), (name, offset)
        (scratch / name).write_bytes(sound[name])
    opened(scratch)


def link_to_elsewhere(path: Path) -> None:
    elsewhere = path.parent / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    "name",
    [
        "zarr.json",
        "label/zarr.json",
        "label/c/0",
        "canary/c",
        "digest",
        "t.logits.commits",
        "t.logits",
        "u.logits",
    ],
)
def test_no_link_is_followed(name: str, whole: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(whole, tmp_path / "c.zarr"))
    link_to_elsewhere(path / name)
    with pytest.raises(CacheError, match="no link in a cache is followed"):
        opened(path)


@pytest.mark.parametrize(
    "name", ["t.logits/c.1.0.0", "u.logits/c.0.0.0", "u.logits.commits/c.0.0.0.0", "views.crc32/c.0.0"]
)
def test_no_link_to_a_shard_is_followed(name: str, whole: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(whole, tmp_path / "c.zarr"))
    link_to_elsewhere(path / name)
    with pytest.raises(CacheError, match=r"no regular file|is damaged"):
        opened(path)


@pytest.mark.parametrize("name", ["u.logits.commits/zarr.json", "t.logits/zarr.json", "label/c/0", "t.logits/c.0.0.0"])
def test_a_pipe_is_refused_and_not_waited_for(name: str, whole: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(whole, tmp_path / "c.zarr"))
    pipe(path / name)
    with pytest.raises(CacheError, match="no regular file"):
        opened(path)


def grow(path: Path) -> None:
    os.truncate(path, 1 << 40)


@pytest.mark.parametrize("name", ["zarr.json", "t.logits/zarr.json"])
def test_endless_metadata_is_refused_unread(name: str, whole: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(whole, tmp_path / "c.zarr"))
    grow(path / name)
    with pytest.raises(CacheError, match=f"{MAX_METADATA_BYTES} at most"):
        opened(path)


@pytest.mark.parametrize("name", ["label/c/0", "canary/c/0/0/0/0", "u.logits.commits/c.0.0.0.0", "t.logits/c.1.0.0"])
def test_an_endless_file_is_refused_unread(name: str, whole: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(whole, tmp_path / "c.zarr"))
    grow(path / name)
    with pytest.raises(CacheError):
        opened(path)


def test_what_is_read_after_the_changes_is_the_same(whole: Path, scratch: Path) -> None:
    keys = [ViewKey(1, 7), ViewKey(0, COUNT - 1)]
    rows, again = open_cache(whole).rows(keys), open_cache(scratch).rows(keys)
    assert (rows["t"].logits == again["t"].logits).all()  # type: ignore[union-attr,operator]
