"""A command lists each folder of commit records once: at a million shards a listing is what opening takes."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from logitcache.cache.cache import open_cache
from logitcache.cache.snapshot import open_snapshot
from logitcache.cache.verify import verify_cache
from logitcache.stage_one.precompute import precompute
from logitcache.student.training import train
from logitcache.views.keys import ViewKey
from tests.cache.made import COUNT, Linear, Pixels, recipe, run
from tests.stage_one.runs import partial
from tests.student import small

COMMITS = "t.logits.commits"


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count how often each folder is listed; folders of commit records are opened before, as no link is followed."""
    counts: Counter[str] = Counter()
    listdir = os.listdir

    def counted(path: Any = ".") -> list[Any]:
        counts[Path(os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else path).name] += 1
        return listdir(path)

    monkeypatch.setattr(os, "listdir", counted)
    return counts


def test_opening_and_reading_lists_commits_once(cache: Path, listed: Counter[str]) -> None:
    opened = open_cache(cache)
    opened.only({"t": ["logits"]}, 1).answers([ViewKey(0, 0)])
    opened.require_intact()
    assert listed[COMMITS] == 1


def test_training_lists_commits_once(tmp_path: Path, listed: Counter[str]) -> None:
    cache = small.fill(tmp_path / "c.zarr")
    listed.clear()
    train(small.student(tmp_path / "run", cache, epochs=1))
    assert listed["net.logits.commits"] == 1


def test_a_run_that_writes_all_that_is_missing_lists_commits_once(tmp_path: Path, listed: Counter[str]) -> None:
    partial(tmp_path / "c.zarr")
    for written in (5, 0):
        listed.clear()
        assert run(tmp_path / "c.zarr", Pixels(COUNT), shard_rows=128).shards_written == written
        assert listed[COMMITS] == 1
    assert verify_cache(open_snapshot(tmp_path / "c.zarr")).problems == ()


def test_a_run_lists_commits_again_if_others_may_have_committed_the_rest(tmp_path: Path, listed: Counter[str]) -> None:
    partial(tmp_path / "c.zarr")
    listed.clear()
    wanted = recipe(tmp_path / "c.zarr", shard_rows=128)
    assert precompute(wanted, teachers={"t": Linear()}, dataset=Pixels(COUNT), part="1/2").shards_left > 0
    assert listed[COMMITS] == 2


def test_verify_lists_commits_once(cache: Path, listed: Counter[str]) -> None:
    assert verify_cache(open_snapshot(cache)).problems == ()
    assert listed[COMMITS] == 1
