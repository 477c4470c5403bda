"""Forged caches, whose own digests agree, are refused without harm."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from logitcache.cache.cache import open_cache
from logitcache.cache.snapshot import open_snapshot
from logitcache.cache.write.writer import commit_record
from logitcache.errors import CacheError, LogitCacheError
from logitcache.store.local import LocalStore
from logitcache.store.shards import RECORD_BYTES
from logitcache.views.keys import ViewKey
from tests.cache.made import COUNT, Pixels, forge, run, teacher


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
    "k of too few": lambda m: m["teachers"]["t"]["stored_logits"].update(
        form={"kind": "top_k", "k": 17, "storage": "hot"}
    ),
    "other encoding": lambda m: m["teachers"]["t"]["stored_logits"].update(
        form={"kind": "dense", "dtype": "float32", "storage": "hot"}
    ),
    "no form": lambda m: m["teachers"]["t"].update(stored_logits=None),
    "a table": lambda m: m["teachers"]["t"]["stored_logits"].update(tables={"basis": "0" * 64}),
    "a feature of no form": lambda m: m["teachers"]["t"].update(features={"f": {"kind": "pooled", "tap": "x"}}),
    "a head of no feature": lambda m: m["teachers"]["t"]["stored_logits"].update(
        form={"kind": "head", "width": 2**40, "bias": False, "storage": "hot"}, tables={"weight": "0" * 64}
    ),
    "a head of another width": lambda m: m["teachers"]["t"].update(
        features={"penultimate": {"kind": "maps", "tap": "fc:input", "storage": "packed"}},
        stored_features={"penultimate": {"shape": [3], "form": {"dtype": "float16", "storage": "packed"}}},
        stored_logits={
            "form": {"kind": "head", "width": 4, "bias": False, "storage": "packed"},
            "tables": {"weight": "0" * 64},
        },
    ),
    "a head of bytes": lambda m: m["teachers"]["t"].update(
        features={"penultimate": {"kind": "maps", "tap": "fc:input", "dtype": "int8", "storage": "packed"}},
        stored_features={"penultimate": {"shape": [4], "form": {"dtype": "int8", "storage": "packed"}}},
        stored_logits={
            "form": {"kind": "head", "width": 4, "bias": False, "storage": "packed"},
            "tables": {"weight": "0" * 64},
        },
    ),
    "a head that was not asked for": lambda m: m["teachers"]["t"].update(
        features={"penultimate": {"kind": "maps", "tap": "fc:input", "storage": "packed"}},
        stored_features={"penultimate": {"shape": [4], "form": {"dtype": "float16", "storage": "packed"}}},
        stored_logits={
            "form": {"kind": "head", "width": 4, "bias": False, "storage": "packed"},
            "tables": {"weight": "0" * 64},
        },
    ),
    "a huge transform": lambda m: m["teachers"]["t"]["stored_logits"].update(
        form={"kind": "transform", "step": 1.0, "bend": 1.0, "pairs": 2**50, "quints": 0}, tables={"basis": "0" * 64}
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
    "reserved name": rename_teacher("views"),
    "checksums that are not there": lambda m: m.update(row_checksums=True),
    "parameters that are not there": lambda m: m.update(parameters=["left"]),
    "endless parameters": lambda m: m.update(parameters=["left"] * 10**5),
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


def test_a_packed_shard_that_decodes_to_gigabytes_is_refused_by_the_manifest(cache: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        teacher = manifest["teachers"]["t"]
        teacher["num_classes"] = 50_000_000
        teacher["stored_logits"]["form"]["storage"] = "packed"

    forge(cache, change)
    with pytest.raises(
        CacheError, match=r"a shard of t\.logits decodes to 12800000000 bytes, 1073741824 at most\. Fix:"
    ):
        open_cache(cache)


def test_a_table_of_gigabytes_is_refused_by_the_manifest_and_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file is sparse, of the size that the manifest declares."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 16))
    head = teacher({"kind": "head", "storage": "packed"})
    run(tmp_path / "c", Pixels(20), network, teachers={"t": head}, shard_rows=64)
    count = 10_000_000

    def change(manifest: dict[str, Any]) -> None:
        manifest["teachers"]["t"]["num_classes"] = count

    (table,) = (path for path in (tmp_path / "c").rglob("c/0/0") if path.stat().st_size == 4 * 16 * 48)
    os.truncate(table, 4 * count * 48)
    forge(tmp_path / "c", change)
    seen, read = [], LocalStore.read
    monkeypatch.setattr(LocalStore, "read", lambda self, key, *most: (seen.append(key), read(self, key, *most))[1])
    for reading in (open_cache, open_snapshot):
        with pytest.raises(CacheError, match=r"the table t\.logits\.weight has 1920000000 bytes, 1073741824 at most"):
            reading(tmp_path / "c")
    assert "zarr.json" in seen
    assert not any("weight" in key for key in seen)


def test_a_forged_shard_of_another_size_is_never_mapped(cache: Path) -> None:
    """Its record agrees with the file, and says a size that no shard of the array has."""
    data = b"\0" * 100
    (cache / "t.logits/c.1.1.0").write_bytes(data)
    record = cache / "t.logits.commits/c.1.1.0.0"
    of_errors = record.read_bytes()[RECORD_BYTES:]
    record.write_bytes(commit_record(memoryview(data), "t.logits/c.1.1.0") + of_errors)
    with pytest.raises(CacheError, match=r"c\.1\.1\.0\.0 is damaged: it states other sizes"):
        open_cache(cache)


def test_opening_reads_no_pickle_and_imports_no_module_of_the_cache(cache: Path) -> None:
    forge(cache, lambda m: m.update(dataset={"kind": "custom", "factory": "os:abort", "arguments": {}}))
    opened = open_cache(cache)
    with pytest.raises(LogitCacheError, match="never names code to run"):
        opened.views()
