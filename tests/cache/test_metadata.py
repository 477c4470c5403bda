"""Damaged or foreign metadata is refused; what the manifest implies is mended."""

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zarr
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.errors import ZarrUserWarning
from zarr.storage import MemoryStore

from logitcache.cache.cache import open_cache
from logitcache.cache.format.metadata import metadata_files
from logitcache.cache.format.root import ROOT, read_manifest
from logitcache.cache.snapshot import locate
from logitcache.errors import CacheError
from tests.cache.made import contents, flip, forge, mend, verified


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


def test_the_root_is_as_zarr_python_writes_it(cache: Path) -> None:
    manifest = read_manifest(locate(cache))
    model = {"kind": "custom", "factory": "χ²", "arguments": {"n": [1, 0.5]}}
    entries = {name: entry.model_copy(update={"model": model}) for name, entry in manifest.teachers.items()}
    manifest = manifest.model_copy(update={"teachers": entries})
    written = metadata_files(manifest)
    of_bytes = default_buffer_prototype().buffer.from_bytes
    files: dict[str, Buffer] = {key: of_bytes(data) for key, data in written.items() if key != ROOT}
    store = MemoryStore(store_dict=files)
    zarr.create_group(store, attributes={"logitcache": manifest.attributes()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ZarrUserWarning)
        zarr.consolidate_metadata(store)
    assert {key: buffer.to_bytes() for key, buffer in files.items()} == written


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


def test_shards_that_do_not_fill_pages_are_refused(cache: Path) -> None:
    forge(cache, lambda manifest: manifest.update(shard_rows=100))  # of 32 bytes each
    for verb in (open_cache, verified, mend):
        with pytest.raises(CacheError, match=r"shards of t\.logits do not fill whole pages"):
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
