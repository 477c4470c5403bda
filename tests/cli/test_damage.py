"""What is said of a damaged cache names the command that made it, and that command mends it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from logitcache.cache.cache import open_cache
from logitcache.cli import main
from logitcache.config.recipe import dump_recipe
from logitcache.errors import CacheError
from logitcache.stage_one.derive.derive import derive
from logitcache.views.keys import ViewKey
from tests.cache.made import contents, flip
from tests.stage_one.derived import derivation, source

SHARD = "a.logits/c.0.0.0"
RECORD = "a.logits.commits/c.0.0.0.0"
KEEP = {"a": {"keep": "all"}}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source(tmp_path_factory.mktemp("made") / "c.zarr", count=60)


@pytest.fixture
def caches(made: Path, tmp_path: Path) -> dict[str, Path]:
    """Make a cache by each command, by the command."""
    derive(derivation(made, tmp_path / "derived", KEEP))
    return {"precompute": source(tmp_path / "precomputed", count=60), "derive": tmp_path / "derived"}


def rotten(file: Path) -> None:
    flip(file, 9)


def removed(file: Path) -> None:
    file.unlink()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("command", ["precompute", "derive"])
@pytest.mark.parametrize(
    ("key", "damage"), [(SHARD, rotten), (SHARD, removed), (RECORD, removed), ("label/c/0", removed)]
)
def test_the_fix_names_the_command_that_made_the_cache(
    caches: dict[str, Path], command: str, key: str, damage: Callable[[Path], None]
) -> None:
    damage(caches[command] / key)
    with pytest.raises(CacheError, match=f"Fix: run the same `logitcache {command}` command again"):
        open_cache(caches[command])


@pytest.mark.parametrize("command", ["precompute", "derive"])
@pytest.mark.parametrize("damage", [cut, removed])
def test_so_does_that_of_rows_which_are_damaged_after_the_cache_is_open(
    caches: dict[str, Path], command: str, damage: Callable[[Path], None]
) -> None:
    opened = open_cache(caches[command])
    damage(caches[command] / SHARD)
    with pytest.raises(CacheError, match=f"Fix: run the same `logitcache {command}` command again"):
        opened.answers([ViewKey(0, 0)])


def test_an_opened_cache_names_its_command_when_its_manifest_is_gone(caches: dict[str, Path]) -> None:
    opened = open_cache(caches["derive"])
    (caches["derive"] / SHARD).unlink()
    (caches["derive"] / "zarr.json").write_text("{}")
    with pytest.raises(CacheError, match="Fix: run the same `logitcache derive` command again"):
        opened.answers([ViewKey(0, 0)])


def test_a_derived_cache_is_repaired_by_its_recipe(
    made: Path, caches: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    derived, file = caches["derive"], tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(derivation(made, tmp_path / "elsewhere", KEEP)))
    sound = contents(derived)
    flip(derived / SHARD, 9)
    (derived / "label/c/0").unlink()
    assert main(["verify", str(derived), "-q", "--json"]) == 3
    document = json.loads(capsys.readouterr().out)
    assert len(document["problems"]) == 2
    assert f"`logitcache verify {derived} --repair RECIPE`" in document["fix"]
    assert main(["verify", str(derived), "--repair", str(file), "-q"]) == 0
    assert contents(derived) == sound
    assert not (tmp_path / "elsewhere").exists()


def test_a_recipe_of_the_other_command_repairs_nothing(
    made: Path, caches: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(derivation(made, tmp_path / "elsewhere", KEEP)))
    assert main(["verify", str(caches["precompute"]), "--repair", str(file), "-q"]) == 2
    assert "looks like a recipe of `derive`, and this takes one of `precompute`" in capsys.readouterr().err
