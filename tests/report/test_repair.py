"""`verify --repair`: exactly what is damaged is written again."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from logitcache.cli.app import main
from logitcache.config.recipe import dump_recipe
from logitcache.stage_one.precompute import PrecomputeRecipe, precompute
from tests.cache.made import contents, flip, recipe, stamps, teacher
from tests.teacher.nets import FEATURES, keeping

SHARD = "t.logits/c.1.1.0"
FACTORY = {"kind": "custom", "factory": "tests.cache.made:Linear"}


def plan(cache: Path, **changes: Any) -> PrecomputeRecipe:
    images = {"kind": "custom", "factory": "tests.cache.made:Pixels", "arguments": {"count": 300}}
    entries = {"dataset": images, "teachers": {"t": teacher(model=FACTORY)}, "shard_rows": 128}
    return recipe(cache, **(entries | changes))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    precompute(plan(tmp_path / "c.zarr"))
    (tmp_path / "r.yaml").write_text(dump_recipe(plan(tmp_path / "other name.zarr")))
    return tmp_path / "c.zarr"


def rot(file: Path) -> None:
    """Flip a byte without a trace in the file's times, as a disk does, as far as that can be done."""
    before = file.stat()
    flip(file, 99)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_exactly_the_damaged_files_are_written_again(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sound, before = contents(cache), stamps(cache)
    rot(cache / SHARD)
    (cache / "label/c/0").unlink()
    assert main(["verify", str(cache), "-q"]) == 3
    capsys.readouterr()
    assert main(["verify", str(cache), "--repair", str(cache.parent / "r.yaml"), "--json", "-q"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []
    assert contents(cache) == sound
    changed = {name for name, stamp in stamps(cache).items() if before[name] != stamp and (cache / name).is_file()}
    assert changed == {SHARD, "t.logits.errors/c.1.1.0.0", "t.logits.commits/c.1.1.0.0", "label/c/0"}


def test_a_sound_cache_is_left_as_it_is(cache: Path) -> None:
    before = stamps(cache)
    assert main(["verify", str(cache), "--repair", str(cache.parent / "r.yaml"), "-q"]) == 0
    assert stamps(cache) == before


def test_a_repair_adds_nothing(cache: Path) -> None:
    sound = contents(cache)
    rot(cache / SHARD)
    more = {"views.num_views": "3", "teachers.u": json.dumps(teacher(model=FACTORY))}
    options = [part for key, value in more.items() for part in ("--set", f"{key}={value}")]
    assert main(["verify", str(cache), "--repair", str(cache.parent / "r.yaml"), *options, "-q"]) == 0
    assert contents(cache) == sound


KEPT = {
    "logits alone": (keeping(), "t.logits/c.0.0.0"),
    "a feature alone": (keeping(False, {"pooled": FEATURES["pooled"]}), "t.pooled/c.0.0.0"),
}


def damaged(cache: Path, kept: dict[str, Any], asked: dict[str, Any], shard: str) -> tuple[dict[str, bytes], Path]:
    """Make a cache of one entry and damage it; returns what it was, and a recipe of another entry."""
    images = {"kind": "custom", "factory": "tests.teacher.nets:images"}
    model = {"kind": "custom", "factory": "tests.teacher.nets:Net"}
    first, other = (plan(cache, dataset=images, teachers={"t": entry | {"model": model}}) for entry in (kept, asked))
    precompute(first)
    sound = contents(cache)
    rot(cache / shard)
    path = cache.parent / "other.yaml"
    path.write_text(dump_recipe(other))
    return sound, path


@pytest.mark.parametrize("name", KEPT)
def test_a_repair_adds_no_target_of_a_teacher(name: str, tmp_path: Path) -> None:
    entry, shard = KEPT[name]
    more = keeping(None, {feature: FEATURES[feature] for feature in ("pooled", "tokens")})
    sound, other = damaged(tmp_path / "c.zarr", entry, more, shard)
    assert main(["verify", str(tmp_path / "c.zarr"), "--repair", str(other), "-q"]) == 0
    assert contents(tmp_path / "c.zarr") == sound


@pytest.mark.parametrize("name", KEPT)
def test_a_recipe_of_other_targets_repairs_nothing(name: str, tmp_path: Path) -> None:
    (kept, shard), (asked, _) = KEPT[name], next(value for key, value in KEPT.items() if key != name)
    _, other = damaged(tmp_path / "c.zarr", kept, asked, shard)
    before = contents(tmp_path / "c.zarr")
    assert main(["verify", str(tmp_path / "c.zarr"), "--repair", str(other), "-q"]) == 4
    assert contents(tmp_path / "c.zarr") == before


def test_another_recipe_repairs_nothing(cache: Path) -> None:
    rot(cache / SHARD)
    before = contents(cache)
    options = ["--repair", str(cache.parent / "r.yaml"), "--set", "views.seed=4", "-q"]
    assert main(["verify", str(cache), *options]) == 4
    assert contents(cache) == before
