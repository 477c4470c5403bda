"""What killed writers left is removed, and nothing else."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from logitcache.cache.cache import open_cache
from logitcache.cache.format.root import GROWING
from logitcache.cache.write import gc
from logitcache.cache.write.gc import collect
from logitcache.cache.write.writer_locks import preparing, writing
from logitcache.cli.app import main
from logitcache.errors import CacheError
from logitcache.store.local import LocalStore
from tests.cache.made import FLIP_AND_CROP, Linear, Pixels, contents, precompute, recipe, run, stamps, teacher, verified
from tests.stage_one.runs import NUM_IMAGES, Stopping, partial


def litter(cache: Path) -> dict[str, int]:
    """Leave behind what killed writers do; returns sizes by name."""
    files = {
        "t.logits/c.1.0.0.77-ab.logitcache-tmp": b"half",
        "digest/claim.1.128.logitcache-tmp": b"",
        "t.logits/c.7.0.0": b"a view that is not there",
        "t.logits.commits/c.0.9.0.0": b"nor this shard",
    }
    for name, data in files.items():
        (cache / name).write_bytes(data)
    (cache / "t.pooled.basis/c").mkdir(parents=True)
    (cache / "t.pooled.basis/c/0").write_bytes(b"of a growth that was not noted")
    return {str(cache / name): len(data) for name, data in files.items()} | {str(cache / "t.pooled.basis"): 30}


def test_a_sound_cache_has_no_garbage(cache: Path) -> None:
    before = stamps(cache)
    assert collect(cache) == []
    assert collect(cache, growth=True) == []
    assert stamps(cache) == before


def test_litter_is_found_counted_and_removed(cache: Path, sound: Path) -> None:
    expected = litter(cache)
    found = collect(cache, dry_run=True)
    assert {garbage.path: garbage.bytes for garbage in found} == expected
    assert {str(path) for path in cache.rglob("*")} >= expected.keys()
    assert collect(cache) == found
    assert contents(cache) == contents(sound)
    assert collect(cache) == []


def test_one_of_very_many_files_is_found_without_a_look_at_the_others() -> None:
    class Unlisted(dict[str, int]):
        def __iter__(self) -> Iterator[str]:
            raise AssertionError("a million files, each looked at for each")

    assert gc._below(Unlisted({"a/c.0": 1, "a/c.1": 2}), "a/c.1") == ["a/c.1"]
    assert gc._below({"a/c.0": 1, "ab": 2, "a/d/e": 3}, "a") == ["a/c.0", "a/d/e"]


def test_a_users_own_files_are_left_alone(cache: Path) -> None:
    for name in ("notes.txt", "t.logits/c.0.0.0.bak", "t.logits/readme", "x.logits/c.0.0.0", "t.logits/c.00.0.0"):
        (cache / name).parent.mkdir(exist_ok=True)
        (cache / name).write_text("mine")
    assert collect(cache, growth=True) == []


def test_shards_that_were_never_committed_are_removed_and_committed_ones_kept(tmp_path: Path) -> None:
    path = tmp_path / "c.zarr"
    partial(path)
    (path / "t.logits/c.0.1.0").write_bytes(b"written, but killed before the record")
    before = contents(path)
    [found] = collect(path)
    assert (found.path, found.why) == (str(path / "t.logits/c.0.1.0"), "a shard that was never committed")
    assert contents(path) == {name: data for name, data in before.items() if name != "t.logits/c.0.1.0"}
    assert run(path, Pixels(NUM_IMAGES), shard_rows=128).shards_written == 5


def test_of_every_array_a_shard_that_was_never_committed_is_found(tmp_path: Path) -> None:
    path = tmp_path / "c.zarr"
    run(path, Pixels(NUM_IMAGES), shard_rows=128, row_checksums=True)
    layout = open_cache(path).layout
    number = layout.shards_per_view
    names = [array.name for group in layout.groups for array in group.arrays]
    assert "views.crc32" in names
    for name in names:
        committed = next((path / name).glob("c.0.0*"))
        (path / name / committed.name.replace("c.0.0", f"c.0.{number}")).write_bytes(b"written, not committed")
    assert sorted(Path(garbage.path).parent.name for garbage in collect(path, dry_run=True)) == sorted(names)


def test_a_cache_that_was_never_created_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "c.zarr"
    (tmp_path / "c.zarr.creating/digest").mkdir(parents=True)
    (tmp_path / "c.zarr.creating/digest/zarr.json").write_text("half")
    [found] = collect(path, dry_run=True)
    assert (found.path, found.bytes) == (f"{path}.creating", 4)
    with preparing(LocalStore(path)), pytest.raises(CacheError, match="does not exist"):
        collect(path)
    (tmp_path / "c.zarr.creating/digest").mkdir(parents=True, exist_ok=True)
    (tmp_path / "c.zarr.creating/digest/zarr.json").write_text("half")
    collect(path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CacheError, match="does not exist"):
        collect(path)


def test_nothing_is_removed_while_a_writer_is_at_work(cache: Path) -> None:
    litter(cache)
    before = stamps(cache)
    with writing(LocalStore(cache)), pytest.raises(CacheError, match="is being written by a run"):
        collect(cache)
    assert stamps(cache) == before


def grow(path: Path, module: Linear | Stopping, num_views: int = 4) -> None:
    entries = {"t": teacher(), "u": teacher()}
    views = {"num_views": num_views, "seed": 3, "augmentations": FLIP_AND_CROP}
    plan = recipe(path, views=views, teachers=entries, shard_rows=128, batch_size=50)
    precompute(plan, teachers={"t": Linear(), "u": module}, dataset=Pixels(300))


def test_a_growth_is_kept_unless_it_is_given_up(cache: Path, sound: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        grow(cache, Stopping(25, seed=1))
    assert collect(cache) == []
    given_up = collect(cache, growth=True)
    assert {garbage.why for garbage in given_up} == {
        "of a growth that is given up",
        "of views that the cache does not have",
        "a shard that was never committed",
        "the note of a growth that is given up",
    }
    assert contents(cache) == contents(sound)
    assert not (cache / "u.logits").exists()
    grow(cache, Linear(seed=9), 3)
    assert open_cache(cache).num_views == 3
    assert verified(cache) == ()


def test_a_damaged_note_of_growth_is_given_up(cache: Path, sound: Path) -> None:
    (cache / GROWING).write_text("?")
    with pytest.raises(CacheError, match=r"gc .* --growth"):
        collect(cache)
    collect(cache, growth=True)
    assert contents(cache) == contents(sound)


def test_the_command_says_what_and_how_much(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    total = sum(litter(cache).values())
    assert main(["gc", str(cache), "--dry-run"]) == 0
    assert f"\n5 files or folders, {total} bytes, would be removed\n" in capsys.readouterr().out
    assert main(["gc", str(cache), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["bytes"], document["dry_run"], len(document["found"])) == (total, False, 5)
    assert main(["gc", str(cache.parent / "absent")]) == 3
