"""Damage of every kind is refused with its reason, named by verify, and mended by precompute."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from logitcache.cache.create import read_manifest
from logitcache.cache.layout import layout_of
from logitcache.cache.manifest import _digest
from logitcache.cache.reader import Cache, open_cache
from logitcache.cache.verify import verify_cache
from logitcache.cache.writer import commit_record
from logitcache.errors import CacheError, LogitCacheError
from logitcache.views.keys import ViewKey
from tests.cache.made import (
    COUNT,
    DENSE16,
    PACKED,
    TOP2,
    Linear,
    Pixels,
    contents,
    flip,
    forge,
    mend,
    recipe,
    run,
    stamps,
    teacher,
    verified,
)

COUNT = 300
KINDS = {"dense16": (DENSE16, 128), "packed": (PACKED, 128), "top_k": (TOP2, None)}
SHARD = "t.logits/c.1.1.0"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "c.zarr"
    run(path, Pixels(COUNT), shard_rows=128)
    return path


@pytest.fixture
def cache(sound: Path, tmp_path: Path) -> Path:
    """A copy to damage: six shards of dense float16 logits."""
    return Path(shutil.copytree(sound, tmp_path / "c.zarr"))


def verified(path: Path) -> tuple[str, ...]:
    manifest = read_manifest(path)
    return verify_cache(path, manifest, layout_of(manifest)).problems


def mend(path: Path, **changes: Any) -> int:
    return run(path, Pixels(COUNT), shard_rows=128, **changes).shards_written


def test_a_sound_cache_has_no_problems(cache: Path) -> None:
    assert verified(cache) == ()
    assert mend(cache) == 0


def test_an_incomplete_cache_is_refused(cache: Path) -> None:
    (cache / "t.commits/c.1.2.0.0").unlink()
    with pytest.raises(CacheError, match="is incomplete: 1 of 6 shards are not committed") as caught:
        open_cache(cache)
    assert caught.value.exit_code == 3
    assert verified(cache) == ("view 1 rows 256..300: not committed",)


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_byte_anywhere_is_noticed(kind: str, tmp_path: Path) -> None:
    logits, rows = KINDS[kind]
    path = tmp_path / "c.zarr"
    run(path, Pixels(COUNT), teachers={"t": teacher(logits)}, shard_rows=rows)
    generator = random.Random(0)
    sound = contents(path)
    for name, data in sound.items():
        for offset in {0, len(data) - 1, *(generator.randrange(len(data)) for _ in range(3))}:
            flip(path / name, offset, 1 << generator.randrange(8))
            try:
                with pytest.raises(CacheError) as caught:
                    open_cache(path)
                assert caught.value.exit_code == 3
            except pytest.fail.Exception:
                # Other spelling of the same: white space, or a word that no reader heeds.
                assert name.endswith("zarr.json"), (name, offset)
                assert _same_metadata(path / name, data), (name, offset)
            (path / name).write_bytes(data)
    open_cache(path)


def _same_metadata(path: Path, data: bytes) -> bool:
    return bool(json.loads(path.read_bytes()) == json.loads(data))


def test_a_flipped_byte_of_a_shard_is_named(cache: Path) -> None:
    flip(cache / SHARD, 1234)
    with pytest.raises(CacheError, match=r"t\.logits view 1 rows 128\.\.256: its bytes differ"):
        open_cache(cache)
    problems = verified(cache)
    assert len(problems) == 1
    assert "t.logits view 1 rows 128..256" in problems[0]
    assert str(cache / SHARD) in problems[0]


def truncate(root: Path) -> None:
    os.truncate(root / SHARD, (root / SHARD).stat().st_size - 1)


def empty(root: Path) -> None:
    os.truncate(root / SHARD, 0)


def extend(root: Path) -> None:
    with open(root / SHARD, "ab") as file:
        file.write(b"\0")


def delete(root: Path) -> None:
    (root / SHARD).unlink()


def make_a_folder(root: Path) -> None:
    (root / SHARD).unlink()
    (root / SHARD).mkdir()


def change_in_place_keeping_the_time(root: Path) -> None:
    status = (root / SHARD).stat()
    flip(root / SHARD, 99)
    os.utime(root / SHARD, ns=(status.st_atime_ns, status.st_mtime_ns))


def damage_the_record(root: Path) -> None:
    flip(root / "t.commits/c.1.1.0.0", 20)


def damage_the_size_in_the_record(root: Path) -> None:
    flip(root / "t.commits/c.1.1.0.0", 5)


def truncate_the_record(root: Path) -> None:
    os.truncate(root / "t.commits/c.1.1.0.0", 39)


DAMAGES = [
    truncate,
    empty,
    extend,
    delete,
    change_in_place_keeping_the_time,
    damage_the_record,
    damage_the_size_in_the_record,
    truncate_the_record,
]


@pytest.mark.parametrize("damage", [*DAMAGES, make_a_folder])
def test_a_damaged_shard_is_refused_and_named(damage: Callable[[Path], None], cache: Path) -> None:
    open_cache(cache)
    damage(cache)
    with pytest.raises(CacheError, match=r"view 1 rows 128\.\.256") as caught:
        open_cache(cache)
    assert caught.value.exit_code == 3
    assert "precompute` command again" in str(caught.value)
    assert len(verified(cache)) == 1


@pytest.mark.parametrize("damage", DAMAGES)
def test_precompute_writes_just_the_damaged_shard_again(
    damage: Callable[[Path], None], cache: Path, sound: Path
) -> None:
    before = stamps(cache)
    damage(cache)
    assert mend(cache) == 1
    assert contents(cache) == contents(sound)
    touched = {name for name, stamp in stamps(cache).items() if before[name] != stamp and (cache / name).is_file()}
    assert touched == {SHARD, "t.commits/c.1.1.0.0"}
    assert open_cache(cache).complete


def test_two_shards_in_each_others_place_are_noticed_and_mended(cache: Path, sound: Path) -> None:
    one, other = cache / "t.logits/c.0.0.0", cache / "t.logits/c.1.0.0"
    one.rename(cache / "aside")
    other.rename(one)
    (cache / "aside").rename(other)
    with pytest.raises(CacheError) as caught:
        open_cache(cache)
    assert "view 0 rows 0..128" in str(caught.value)
    assert "view 1 rows 0..128" in str(caught.value)
    assert mend(cache) == 2
    assert contents(cache) == contents(sound)


def test_records_and_shards_swapped_together_are_no_damage_that_a_record_shows_but_rows_of_another_place(
    cache: Path, sound: Path
) -> None:
    """Digests bind bytes, not places: whoever moves both has forged a cache, not damaged one."""
    for folder, a, b in (("t.logits", "c.0.0.0", "c.1.0.0"), ("t.commits", "c.0.0.0.0", "c.1.0.0.0")):
        shutil.copy(sound / folder / a, cache / folder / b)
        shutil.copy(sound / folder / b, cache / folder / a)
    assert verified(cache) == ()


@pytest.mark.parametrize("name", ["label/c/0", "digest/c/0", "canary/c/0/0/0/0"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_sample_array_is_refused_and_mended(name: str, damage: str, cache: Path, sound: Path) -> None:
    if damage == "flip":
        flip(cache / name, 17)
    elif damage == "truncate":
        os.truncate(cache / name, 8)
    else:
        (cache / name).unlink()
    with pytest.raises(CacheError, match=name.split("/")[0]):
        open_cache(cache)
    assert any(name in problem for problem in verified(cache))
    assert mend(cache) == 0
    assert contents(cache) == contents(sound)


EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "shape": lambda found: found["shape"].__setitem__(1, 299),
    "dtype": lambda found: found.update(data_type="int16", fill_value=0),
    "codecs": lambda found: found["codecs"][0]["configuration"]["codecs"].append(
        {"name": "gzip", "configuration": {"level": 1}}
    ),
    "chunks": lambda found: found["codecs"][0]["configuration"]["chunk_shape"].__setitem__(1, 64),
    "index": lambda found: found["codecs"][0]["configuration"].update(index_location="start"),
    "names": lambda found: found["dimension_names"].reverse(),
    "fill": lambda found: found.update(fill_value=0.0),
    "keys": lambda found: found.update(chunk_key_encoding={"name": "default", "configuration": {"separator": "/"}}),
    "everything": lambda found: found.clear(),
    "a huge shape": lambda found: found.update(shape=[10**15, 10**15, 16]),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("place", ["array", "consolidated"])
def test_edited_metadata_is_refused_and_mended(edit: str, place: str, cache: Path, sound: Path) -> None:
    file = cache / ("t.logits/zarr.json" if place == "array" else "zarr.json")
    found = json.loads(file.read_bytes())
    EDITS[edit](found if place == "array" else found["consolidated_metadata"]["metadata"]["t.logits"])
    file.write_text(json.dumps(found))
    with pytest.raises(CacheError, match=r"zarr\.json") as caught:
        open_cache(cache)
    assert caught.value.exit_code == 3
    assert verified(cache)
    assert mend(cache) == 0
    assert contents(cache) == contents(sound)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "7", '{"a": NaN}', "\xff", '{"a":' * 5000])
def test_metadata_that_is_no_json_object_is_refused_and_mended(text: str, cache: Path, sound: Path) -> None:
    (cache / "t.logits/zarr.json").write_text(text, encoding="latin-1")
    with pytest.raises(CacheError, match=r"zarr\.json"):
        open_cache(cache)
    assert mend(cache) == 0
    assert contents(cache) == contents(sound)


def test_the_same_metadata_in_other_words_is_no_damage(cache: Path) -> None:
    for file in cache.rglob("zarr.json"):
        file.write_text(json.dumps(json.loads(file.read_bytes()), sort_keys=True))
    assert open_cache(cache).complete
    assert mend(cache) == 0


def test_metadata_of_another_zarr_may_be_worded_in_another_way(cache: Path) -> None:
    forge(cache, lambda manifest: manifest["versions"].update(zarr="3.1.0"))
    file = cache / "t.logits/zarr.json"
    found = json.loads(file.read_bytes())
    del found["attributes"], found["storage_transformers"]
    file.write_text(json.dumps(found))
    assert open_cache(cache).complete
    found["dimension_names"].reverse()
    file.write_text(json.dumps(found))
    with pytest.raises(CacheError, match=r"t\.logits/zarr\.json does not describe"):
        open_cache(cache)


def test_a_manifest_that_was_changed_is_refused(cache: Path) -> None:
    file = cache / "zarr.json"
    file.write_text(file.read_text().replace('"seed": 3', '"seed": 4'))
    for verb in (open_cache, verified, mend):
        with pytest.raises(CacheError, match="its sha256 differs") as caught:
            verb(cache)
        assert caught.value.exit_code == 3


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"a":' * 5000, "\xff\xfe", '{"node_type": "group"}'])
def test_a_root_that_cannot_be_read_is_refused(text: str, cache: Path) -> None:
    (cache / "zarr.json").write_text(text, encoding="latin-1")
    for verb in (open_cache, mend):
        with pytest.raises(CacheError, match=r"damaged|not a logitcache cache"):
            verb(cache)


def test_another_format_version_is_refused(cache: Path) -> None:
    found = json.loads((cache / "zarr.json").read_bytes())
    found["attributes"]["logitcache"]["format_version"] = 2
    (cache / "zarr.json").write_text(json.dumps(found))
    with pytest.raises(CacheError, match="format version 2, this release reads 1"):
        open_cache(cache)


def test_what_is_no_cache_is_refused(tmp_path: Path) -> None:
    zarr.create_group(tmp_path / "other.zarr", attributes={"made_by": "someone"})
    zarr.create_array(tmp_path / "array.zarr", shape=(3,), dtype="i4")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("text")
    reasons = {
        "other.zarr": "not a logitcache cache",
        "array.zarr": "not a logitcache cache",
        "empty": "it has no zarr.json",
        "file": "it has no zarr.json",
        "absent": "does not exist",
    }
    for name, reason in reasons.items():
        with pytest.raises(CacheError, match=reason) as caught:
            open_cache(tmp_path / name)
        assert caught.value.exit_code == 3


def test_a_missing_array_is_refused_and_mended(cache: Path, sound: Path) -> None:
    shutil.rmtree(cache / "t.logits")
    with pytest.raises(CacheError, match=r"t\.logits"):
        open_cache(cache)
    assert mend(cache) == 6
    assert contents(cache) == contents(sound)


def test_leftovers_of_a_killed_writer_are_removed(cache: Path, sound: Path) -> None:
    (cache / "t.logits/c.0.0.0.12-ab.logitcache-tmp").write_bytes(b"part")
    assert open_cache(cache).complete
    assert mend(cache) == 0
    assert contents(cache) == contents(sound)


def forge(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest and sign it again, as an attacker would."""
    found = json.loads((path / "zarr.json").read_bytes())
    entry = found["attributes"]["logitcache"]
    change(entry["manifest"])
    entry["sha256"] = _digest(entry["manifest"])
    (path / "zarr.json").write_text(json.dumps(found))


def rename_teacher(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda manifest: manifest["teachers"].update({name: manifest["teachers"].pop("t")})


FORGERIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "path up": rename_teacher("../../etc"),
    "absolute path": rename_teacher("/etc/passwd"),
    "dotted name": rename_teacher("t.logits"),
    "empty name": rename_teacher(""),
    "line break": rename_teacher("t\n"),
    "nul": rename_teacher("t\0"),
    "no teachers": lambda m: m.update(teachers={}),
    "endless views": lambda m: m["views"].update(num_views=2**32 - 1),
    "endless images": lambda m: m["fingerprint"].update(num_images=10**12),
    "more images than numbers": lambda m: m["fingerprint"].update(num_images=10**30),
    "no images": lambda m: m["fingerprint"].update(num_images=0),
    "endless classes": lambda m: m["teachers"]["t"].update(num_classes=10**15),
    "endless pixels": lambda m: m.update(image_shape=[10**6, 10**6, 10**6]),
    "large pixels": lambda m: m.update(image_shape=[3, 10**6, 10**5]),
    "endless shards": lambda m: m.update(shard_rows=10**14 * 128),
    "tiny shards": lambda m: m.update(shard_rows=1),
    "unaligned shards": lambda m: m.update(shard_rows=129),
    "k of too few": lambda m: m["teachers"]["t"].update(logits={"kind": "top_k", "k": 17, "storage": "hot"}),
    "other encoding": lambda m: m["teachers"]["t"].update(
        logits={"kind": "dense", "dtype": "float32", "storage": "hot"}
    ),
    "unknown encoding": lambda m: m["teachers"]["t"].update(logits={"kind": "pickle"}),
    "no canaries": lambda m: m.update(canaries=[]),
    "canary of no view": lambda m: m["canaries"][0].update(view=-1),
    "canary of no image": lambda m: m["canaries"][0].update(index=COUNT),
    "many canaries": lambda m: m["canaries"].extend(m["canaries"] * 9),
    "true for one": lambda m: m["views"].update(num_views=True),
    "text for a number": lambda m: m.update(shard_rows="128"),
    "nan": lambda m: m["teachers"]["t"]["preprocessing"].update(mean=[float("nan")] * 3),
    "unknown key": lambda m: m.update(factory="os:abort"),
    "deep": lambda m: m["teachers"]["t"].update(model=deep(50)),
    "too deep": lambda m: m["teachers"]["t"].update(model=deep(900)),
    "list": lambda m: m.update(teachers=[]),
    "surrogate": lambda m: m["versions"].update(torch="\ud800"),
}
HARMLESS = {"deep"}


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"a": value}
    return value


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_manifest_is_refused_without_a_large_allocation(name: str, cache: Path) -> None:
    forge(cache, FORGERIES[name])
    if name in HARMLESS:
        open_cache(cache)
        return
    with pytest.raises(CacheError) as caught:
        open_cache(cache)
    assert len(str(caught.value)) < 5000


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += places(item, (*path, key))
    return found


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_of_a_signed_manifest_opens_or_is_a_cache_error(
    data: st.DataObject, sound: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = fuzzed(sound, tmp_path_factory)
    shutil.copy(sound / "zarr.json", path / "zarr.json")

    def change(manifest: dict[str, Any]) -> None:
        for _ in range(data.draw(st.integers(1, 2))):
            place = data.draw(st.sampled_from(places(manifest)[1:]))
            holder: Any = manifest
            for key in place[:-1]:
                holder = holder[key]
            if data.draw(st.booleans()):
                holder[place[-1]] = data.draw(JSON | st.sampled_from([-1, 0, 2**31, 2**63, 10**40, 1e308, "../x"]))
            else:
                del holder[place[-1]]

    forge(path, change)
    try:
        cache = open_cache(path)
        cache.rows([ViewKey(0, 0), ViewKey(cache.num_views - 1, len(cache) - 1)])
        cache.views(Pixels(COUNT), verify="numeric")
    except LogitCacheError:
        pass


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(entry=JSON | st.fixed_dictionaries({"logitcache": JSON}))
def test_any_attributes_are_a_cache_error(entry: Any, sound: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = fuzzed(sound, tmp_path_factory)
    found = json.loads((sound / "zarr.json").read_bytes())
    found["attributes"] = entry
    (path / "zarr.json").write_text(json.dumps(found))
    with pytest.raises(CacheError):
        open_cache(path)


_FUZZED: dict[str, Path] = {}


def fuzzed(sound: Path, factory: pytest.TempPathFactory) -> Path:
    if not _FUZZED:
        _FUZZED["one"] = Path(shutil.copytree(sound, factory.mktemp("fuzz") / "c.zarr"))
    return _FUZZED["one"]


def test_a_forged_shard_of_another_size_is_never_mapped(cache: Path) -> None:
    """Its record agrees, so that only the layout tells: a row past the end would kill the process."""
    data = b"\0" * 100
    (cache / SHARD).write_bytes(data)
    (cache / "t.commits/c.1.1.0.0").write_bytes(commit_record(memoryview(data)))
    opened = open_cache(cache)
    with pytest.raises(CacheError, match="has 100 bytes, its layout needs"):
        opened.rows([ViewKey(1, 130)])


def test_opening_reads_no_pickle_and_imports_no_module_of_the_cache(cache: Path) -> None:
    forge(cache, lambda m: m.update(dataset={"kind": "custom", "factory": "os:abort", "arguments": {}}))
    opened = open_cache(cache)
    with pytest.raises(LogitCacheError, match="never names code to run"):
        opened.views()


def test_another_teacher_module_does_not_mend(cache: Path) -> None:
    flip(cache / SHARD, 3)
    before = contents(cache)
    with pytest.raises(LogitCacheError, match="weights"):
        run(cache, Pixels(COUNT), Linear(seed=5), shard_rows=128)
    assert contents(cache) == before


def test_sizes_of_arrays_do_not_depend_on_values(cache: Path) -> None:
    opened = Cache(cache, read_manifest(cache))
    assert np.array_equal(opened.labels, np.full(COUNT, -1))
    assert recipe(cache).views == opened.manifest.views
