"""What cannot be derived is refused with the reason, and what is damaged is mended by the same command."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from logitcache.cache.cache import open_cache
from logitcache.errors import CacheError, DataError, LogitCacheError, MismatchError, RecipeError
from logitcache.stage_one.derive import derive as module
from logitcache.stage_one.derive.derive import derive
from logitcache.stage_one.precompute import precompute
from tests.cache.made import (
    DENSE32,
    TOP2_PACKED,
    Linear,
    Pixels,
    contents,
    flip,
    recipe,
    run,
    shard_files,
    teacher,
    verified,
)
from tests.stage_one.derived import CLASSES, COUNT, derivation, source
from tests.stage_one.runs import partial

PACKED = {"kind": "dense", "storage": "packed"}
TOP3 = {"kind": "top_k", "k": 3, "storage": "packed"}
TRANSFORM = {"kind": "transform", "step": 0.2, "corrections": 4}
A = {"a": {"logits": TRANSFORM}}
MEAN = {"members": {"a": 1, "b": 1}, "average": "probabilities", "logits": PACKED}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source(tmp_path_factory.mktemp("source") / "c.zarr")


@pytest.fixture(scope="module")
def top(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of `a` the largest logits alone, of `b` all."""
    path = tmp_path_factory.mktemp("top") / "c.zarr"
    return source(path, {"a": teacher(TOP2_PACKED), "b": teacher(DENSE32)})


def refused(cache: Path, out: Path, teachers: dict[str, Any], **changes: Any) -> LogitCacheError:
    with pytest.raises(LogitCacheError) as error:
        derive(derivation(cache, out, teachers, **changes))
    assert not out.exists()
    assert "Fix: " in str(error.value)
    return error.value


@pytest.mark.parametrize(
    ("teachers", "changes", "kind", "message"),
    [
        ({"c": {"logits": PACKED}}, {}, RecipeError, r"teachers.c: .* has no teacher 'c', but a, b\."),
        ({"c": MEAN | {"members": {"a": 1, "z": 1}}}, {}, RecipeError, r"has no teacher 'z', but a, b\."),
        ({"a": {"keep": ["pooled"]}}, {}, RecipeError, r"has no \['pooled'\], but \['logits'\]"),
        ({"a": {"logits": {"kind": "head"}}}, {}, RecipeError, "last layer, which are not in a cache"),
        ({"a": {"logits": {"kind": "top_k", "k": 99}}}, {}, RecipeError, "k = 99 of 16 classes"),
        (A, {"num_views": 3}, RecipeError, "num_views is 3, .* has 2. Fix: at most these"),
        ({"a": {"keep": "all"}}, {"shard_rows": 256}, RecipeError, "comes in shards of 128 rows"),
    ],
)
def test_what_the_source_does_not_have_is_named(
    two: Path, tmp_path: Path, teachers: dict[str, Any], changes: dict[str, Any], kind: type, message: str
) -> None:
    error = refused(two, tmp_path / "d", teachers, **changes)
    assert type(error) is kind
    assert re.search(message, str(error)), error


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({}, "nothing is kept"),
        (MEAN | {"average": None}, "several members are made one"),
        (MEAN | {"keep": "all"}, "several members are made one"),
        ({"average": "logits", "logits": PACKED}, "there is one member"),
        ({"temperature": 2, "logits": PACKED}, "temperature is of `average: probabilities`"),
        ({"logits": PACKED, "keep": ["logits"]}, "either encoded anew or kept"),
        ({"keep": "some"}, "must be a list or 'all'"),
        ({"members": {"a": 0}, "logits": PACKED}, "greater than 0"),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused(entry: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        derivation(tmp_path / "c", tmp_path / "d", {"a": entry})


def test_of_the_largest_logits_alone_nothing_else_is_made(top: Path, tmp_path: Path) -> None:
    for teachers in ({"a": {"logits": TOP3}}, {"m": MEAN}, {"m": MEAN | {"average": "logits"}}):
        error = refused(top, tmp_path / "d", teachers)
        assert isinstance(error, RecipeError)
        assert "keeps of 'a' the largest logits alone (top_k): what the others were is lost" in str(error)
    derive(derivation(top, tmp_path / "d", {"a": {"keep": ["logits"]}, "b": {"logits": PACKED}}))
    ours, theirs = contents(tmp_path / "d"), contents(top)
    assert {file for file in ours if file.startswith("a.") and ours[file] != theirs[file]} == set()
    assert open_cache(tmp_path / "d").manifest.teachers["a"].errors == open_cache(top).manifest.teachers["a"].errors


def test_teachers_of_other_classes_make_no_ensemble(tmp_path: Path) -> None:
    plan = recipe(tmp_path / "c", teachers={"a": teacher(DENSE32), "b": teacher(DENSE32)})
    precompute(plan, teachers={"a": Linear(16), "b": Linear(32)}, dataset=Pixels(50))
    error = refused(tmp_path / "c", tmp_path / "d", {"m": MEAN})
    assert isinstance(error, MismatchError)
    assert "{'a': 16, 'b': 32}" in str(error)


def test_a_source_that_is_not_finished_or_is_damaged_is_refused(two: Path, tmp_path: Path) -> None:
    partial(tmp_path / "begun")
    assert "is incomplete" in str(refused(tmp_path / "begun", tmp_path / "d", {"t": {"logits": PACKED}}))
    assert "does not exist" in str(refused(tmp_path / "none", tmp_path / "d", A))
    damaged = Path(shutil.copytree(two, tmp_path / "damaged"))
    flip(shard_files(damaged, "a.logits")[3], 7)
    assert "a.logits view 1 rows 0..128: its bytes differ" in str(refused(damaged, tmp_path / "d", A))


def test_a_shard_that_is_damaged_meanwhile_ends_the_run_and_what_was_committed_is_kept(
    two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = Path(shutil.copytree(two, tmp_path / "damaged"))
    plan = derivation(damaged, tmp_path / "d", {"a": {"logits": TOP3}}, shard_rows=128)
    real = module.find_derived_todo

    def then_damaged(*given: Any) -> Any:
        found = real(*given)
        flip(shard_files(damaged, "a.logits")[3], 7)
        return found

    monkeypatch.setattr(module, "find_derived_todo", then_damaged)
    with pytest.raises(CacheError, match=r"a\.logits view 1 rows 0\.\.128: its bytes differ"):
        derive(plan)
    monkeypatch.undo()
    flip(shard_files(damaged, "a.logits")[3], 7)
    assert 3 <= derive(plan).shards_written <= 5  # whether the last before it was committed is the writer's affair
    assert verified(tmp_path / "d") == ()


def test_nothing_is_derived_into_its_source_or_over_anything_else(two: Path, tmp_path: Path) -> None:
    before = contents(two)
    for out in (two, two / "inside", two.parent):
        with pytest.raises(RecipeError, match="a cache is not changed by deriving from it"):
            derive(derivation(two, out, A))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(CacheError, match="exists and is no cache"):
        derive(derivation(two, tmp_path / "notes", A))
    assert contents(two) == before


def test_another_cache_at_out_is_left_as_it_is(two: Path, tmp_path: Path) -> None:
    derive(derivation(two, tmp_path / "d", A))
    before = contents(tmp_path / "d")
    others: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        (
            {"a": {"logits": {**TRANSFORM, "step": 0.3}}},
            {},
            r'teachers.a.logits: it has .*"step": 0.2, .* the recipe .*"step": 0.3,',
        ),
        ({"b": {"logits": TRANSFORM}}, {}, r"teachers: it has \['a'\], the recipe \['b'\]"),
        (A, {"num_views": 1}, "num_views: it has 2, these make 1"),
        (A, {"shard_rows": 32}, "shard_rows: it has 64, the recipe 32"),
    ]
    for teachers, changes, message in others:
        with pytest.raises(MismatchError, match=message):
            derive(derivation(two, tmp_path / "d", teachers, **changes))
    other = source(tmp_path / "other", count=COUNT - 1)
    with pytest.raises(MismatchError, match="it is of other images"):
        derive(derivation(other, tmp_path / "d", A))
    retaught = tmp_path / "retaught"
    plan = recipe(retaught, teachers={"a": teacher(DENSE32)}, shard_rows=128)
    precompute(plan, teachers={"a": Linear(CLASSES, seed=5)}, dataset=Pixels(COUNT, CLASSES))
    with pytest.raises(MismatchError, match=r"teachers\.a: it was derived from .*, the recipe derives from "):
        derive(derivation(retaught, tmp_path / "d", A))
    with pytest.raises(MismatchError, match="is another cache than"):
        derive(derivation(two, retaught, A))
    assert contents(tmp_path / "d") == before


def test_a_source_that_grows_stays_the_source_of_what_was_made_of_it(tmp_path: Path) -> None:
    two = source(tmp_path / "c")
    plan = derivation(two, tmp_path / "d", A)
    derive(plan)
    before = contents(tmp_path / "d")
    views = {**recipe(two).views.model_dump(mode="json"), "num_views": 3}
    entries = {name: teacher(DENSE32) for name in "abn"}
    modules = {name: Linear(CLASSES, seed=number) for number, name in enumerate(entries)}
    grown = recipe(two, teachers=entries, shard_rows=128, views=views)
    precompute(grown, teachers=modules, dataset=Pixels(COUNT, CLASSES))
    with pytest.raises(MismatchError, match="num_views: it has 2, these make 3"):
        derive(plan)
    assert derive(plan.model_copy(update={"num_views": 2})).shards_written == 0
    assert contents(tmp_path / "d") == before


def test_whatever_is_damaged_is_written_again_as_it_was(two: Path, tmp_path: Path) -> None:
    plan = derivation(two, tmp_path / "d", A | {"b": {"keep": ["logits"]}})
    derive(plan)
    before = contents(tmp_path / "d")
    files = [
        "zarr.json",
        "label/c/0",
        "a.logits.basis/c/0/0",
        "a.logits.commits/zarr.json",
        "a.logits.commits/c.1.1.0.0",
        "b.logits/c.0.1.0",
        next(file for file in before if file.startswith("a.logits.") and "/c.1.2" in file),
    ]
    for file in files[1:]:
        flip(tmp_path / "d" / file, len(before[file]) // 2)
        assert verified(tmp_path / "d") != ()
        assert derive(plan).shards_written == (1 if "/c." in file else 0)
        assert contents(tmp_path / "d") == before
    flip(tmp_path / "d" / "zarr.json", len(before["zarr.json"]) // 2)
    with pytest.raises(CacheError, match="damaged"):
        derive(plan)


def test_no_teacher_adds_its_own_answers_to_a_derived_cache(tmp_path: Path) -> None:
    """Not even with the recipe's own encoding: these answers are to float16 logits."""
    path = tmp_path / "d"
    source(tmp_path / "c", {"t": teacher()})
    derive(derivation(tmp_path / "c", path, {"t": {"logits": TRANSFORM}}))
    before = contents(path)
    for views in (2, 3):
        entry = {**recipe(path).views.model_dump(mode="json"), "num_views": views}
        with pytest.raises(MismatchError, match=r"was derived from another cache \(t of t\).*Fix: let precompute add"):
            run(path, Pixels(COUNT, CLASSES), Linear(CLASSES, seed=0), teachers={"t": teacher(TRANSFORM)}, views=entry)
    assert contents(path) == before


def test_what_does_not_fit_its_dtype_is_told(tmp_path: Path) -> None:
    plan = recipe(tmp_path / "c", teachers={"t": teacher(DENSE32)}, shard_rows=128)
    precompute(plan, teachers={"t": Linear(CLASSES, scale=1e5)}, dataset=Pixels(50))
    with pytest.raises(DataError, match=r"view 0 of image \d+ does not fit torch.float16, .*\n  Fix: teachers.t.logi"):
        derive(derivation(tmp_path / "c", tmp_path / "d", {"t": {"logits": PACKED}}))


def test_probabilities_of_images_of_any_number_of_classes_have_no_mean(tmp_path: Path) -> None:
    images = Pixels(50)
    images.targets = (torch.arange(50 * CLASSES).reshape(50, CLASSES) % 3 == 0).to(torch.int8).numpy()
    images.__class__ = type("Multi", (Pixels,), {"__getitem__": lambda s, i: (s.images[i], s.targets[i])})
    plan = recipe(tmp_path / "c", teachers={"a": teacher(DENSE32), "b": teacher(DENSE32)}, shard_rows=128)
    precompute(plan, teachers={"a": Linear(CLASSES), "b": Linear(CLASSES, seed=1)}, dataset=images)
    assert "have no probabilities that add up to 1" in str(refused(tmp_path / "c", tmp_path / "d", {"m": MEAN}))
    assert derive(derivation(tmp_path / "c", tmp_path / "d", {"m": MEAN | {"average": "logits"}})).shards_left == 0
