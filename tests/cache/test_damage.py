"""Damaged shards and records are refused with their reason, named by verify, and mended by precompute."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from logitcache.cache.cache import open_cache
from logitcache.errors import CacheError, LogitCacheError
from tests.cache.made import (
    COUNT,
    DENSE16,
    PACKED,
    TOP2,
    Linear,
    Pixels,
    contents,
    flip,
    mend,
    run,
    stamps,
    teacher,
    verified,
)

KINDS = {"dense16": (DENSE16, 128), "packed": (PACKED, 128), "top_k": (TOP2, None)}
SHARD = "t.logits/c.1.1.0"


def test_a_sound_cache_has_no_problems(cache: Path) -> None:
    assert verified(cache) == ()
    assert mend(cache) == 0


def test_an_incomplete_cache_is_refused(cache: Path) -> None:
    (cache / "t.logits.commits/c.1.2.0.0").unlink()
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
    flip(root / "t.logits.commits/c.1.1.0.0", 20)


def damage_the_size_in_the_record(root: Path) -> None:
    flip(root / "t.logits.commits/c.1.1.0.0", 5)


def truncate_the_record(root: Path) -> None:
    os.truncate(root / "t.logits.commits/c.1.1.0.0", 39)


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
    assert touched == {SHARD, "t.logits.errors/c.1.1.0.0", "t.logits.commits/c.1.1.0.0"}
    assert open_cache(cache).complete


@pytest.mark.parametrize("with_records", [False, True])
def test_two_shards_in_each_others_place_are_noticed_and_mended(cache: Path, sound: Path, with_records: bool) -> None:
    pairs = [("t.logits/c.0.0.0", "t.logits/c.1.0.0"), ("t.logits.commits/c.0.0.0.0", "t.logits.commits/c.1.0.0.0")]
    for one, other in pairs[: 1 + with_records]:
        (cache / one).rename(cache / "aside")
        (cache / other).rename(cache / one)
        (cache / "aside").rename(cache / other)
    with pytest.raises(CacheError) as caught:
        open_cache(cache)
    assert "view 0 rows 0..128" in str(caught.value)
    assert "view 1 rows 0..128" in str(caught.value)
    assert mend(cache) == 2
    assert contents(cache) == contents(sound)


def test_leftovers_of_a_killed_writer_are_removed(cache: Path, sound: Path) -> None:
    (cache / "t.logits/c.0.0.0.12-ab.logitcache-tmp").write_bytes(b"part")
    assert open_cache(cache).complete
    assert mend(cache) == 0
    assert contents(cache) == contents(sound)


def test_another_teacher_module_does_not_mend(cache: Path) -> None:
    flip(cache / SHARD, 3)
    before = contents(cache)
    with pytest.raises(LogitCacheError, match="weights"):
        run(cache, Pixels(COUNT), Linear(seed=5), shard_rows=128)
    assert contents(cache) == before
