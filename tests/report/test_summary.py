"""What a summary says of a cache, against plain loops over its dense answers."""

import dataclasses
import functools
import itertools
import json
import operator
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from logitcache.cache.cache import Cache, open_cache
from logitcache.cache.format.manifest import Manifest
from logitcache.cache.format.samples import recordable
from logitcache.cli import main
from logitcache.errors import CacheError, RecipeError
from logitcache.report import summary
from logitcache.report.summary import ENSEMBLE, CacheSummary, ShardCounter, summarize
from logitcache.stage_one.precompute import precompute
from logitcache.views.datasets import ImageFolder
from logitcache.views.keys import ViewKey
from tests.cache.made import DENSE32, TOP2_PACKED, Linear, Pixels, recipe, run, teacher, write_images

COUNT, CLASSES = 150, 6
PACKED32 = {**DENSE32, "storage": "packed"}


def fill(path: Path, seeds: dict[str, int], images: object, logits: Any = PACKED32, **changes: Any) -> Path:
    entries = {name: teacher(logits) for name in seeds}
    plan = recipe(path, teachers=entries, **({"shard_rows": 64} | changes))
    modules = {name: Linear(CLASSES, seed=seed) for name, seed in seeds.items()}
    precompute(plan, teachers=modules, dataset=images)
    return path


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two teachers, two views, 150 images of six classes."""
    path = tmp_path_factory.mktemp("summary") / "two"
    return fill(path, {"a": 0, "b": 1}, Pixels(COUNT, CLASSES))


def probabilities(cache: Cache, name: str) -> np.ndarray:
    """The answers of a teacher, float64 [V, N, C]."""
    found = []
    for view in range(cache.num_views):
        logits = cache.answers([ViewKey(view, index) for index in range(len(cache))])[name].logits
        found.append(torch.softmax(logits.double(), dim=1).numpy())
    return np.stack(found)


def by_name(result: CacheSummary) -> dict[str, summary.TeacherSummary]:
    return {item.teacher: item for item in result.teachers}


def test_figures_are_those_of_a_plain_loop(labelled: Path) -> None:
    result, cache = summarize(labelled), open_cache(labelled)
    assert (result.images, result.views, result.labelled_row_views) == (COUNT, 2, 2 * COUNT)
    p = {name: probabilities(cache, name) for name in ("a", "b")}
    p[ENSEMBLE] = (p["a"] + p["b"]) / 2
    assert list(by_name(result)) == list(p)
    for name, item in by_name(result).items():
        order = np.argsort(-p[name], axis=2)
        assert item.top1 == pytest.approx(np.mean(order[..., 0] == cache.labels))
        assert item.top5 == pytest.approx(np.mean((order[..., :5] == cache.labels[:, None]).any(axis=2)))
        assert item.entropy == pytest.approx(np.mean(-np.sum(p[name] * np.log(p[name]), axis=2)), rel=1e-5)
        assert (item.classes, item.kept_mass) == (CLASSES, None)
        for row in result.per_view:
            hits = p[name][row["view"]].argmax(axis=1) == cache.labels
            assert row[name] == pytest.approx(hits.mean())
        for row in result.per_class:
            mine = cache.labels == row["label"]
            assert row["row_views"] == 2 * mine.sum()
            assert row[name] == pytest.approx(np.mean(p[name][:, mine].argmax(axis=2) == row["label"]))
    [pair] = result.agreement
    same = p["a"].argmax(axis=2) == p["b"].argmax(axis=2)
    assert (pair.first, pair.second, pair.agreement) == ("a", "b", pytest.approx(same.mean()))
    assert [row["view"] for row in result.per_view] == [0, 1]
    assert [row["label"] for row in result.per_class] == list(range(CLASSES))


def test_shards_may_be_counted_in_any_order_and_in_any_pieces(labelled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = open_cache(labelled)
    parts = [*map(ShardCounter(cache.snapshot), cache.layout.shards())]
    assert len(parts) == 6
    forwards, backwards = functools.reduce(operator.add, parts), functools.reduce(operator.add, parts[::-1])
    whole = summarize(labelled)
    for total in (forwards, backwards):
        assert total.rows == 2 * COUNT
        assert total.teachers["a"].totals[1] == pytest.approx(by_name(whole)["a"].top1 * 2 * COUNT)  # type: ignore[operator]
    monkeypatch.setattr(summary, "NUMBERS", 7 * CLASSES)
    again = summarize(labelled)
    assert again.per_view == whole.per_view
    assert again.per_class == whole.per_class
    assert by_name(again)["a"].entropy == pytest.approx(by_name(whole)["a"].entropy)


def test_the_first_views_alone_may_be_read(labelled: Path) -> None:
    first, both = summarize(labelled, 1), summarize(labelled)
    assert first.labelled_row_views == COUNT
    assert first.per_view == both.per_view[:1]
    with pytest.raises(RecipeError, match="at most these"):
        summarize(labelled, 3)


def test_the_mass_that_top_k_keeps_is_told(tmp_path: Path) -> None:
    dense = open_cache(fill(tmp_path / "dense", {"a": 0}, Pixels(COUNT, CLASSES)))
    [found] = summarize(fill(tmp_path / "top", {"a": 0}, Pixels(COUNT, CLASSES), TOP2_PACKED)).teachers
    p = np.sort(probabilities(dense, "a"), axis=2)[..., ::-1]
    assert found.kept_mass == pytest.approx(p[..., :2].sum(axis=2).mean(), rel=1e-5)
    assert found.top1 == pytest.approx(np.mean(probabilities(dense, "a").argmax(axis=2) == dense.labels))


def test_a_mixed_image_has_the_label_of_its_larger_part(tmp_path: Path) -> None:
    views = {"num_views": 3, "mixing": [{"kind": "mixup"}]}
    cache = open_cache(fill(tmp_path / "mixed", {"a": 0}, Pixels(COUNT, CLASSES), views=views))
    best = probabilities(cache, "a").argmax(axis=2)
    hits = []
    for view, index in itertools.product(range(3), range(COUNT)):
        spec = cache.manifest.views
        mixture = spec.mixture([ViewKey(view, index)], spec.partners(COUNT, COUNT), (4, 4))
        assert mixture is not None
        own = mixture.share[0] >= 0.5
        hits.append(best[view, index] == cache.labels[index if own else mixture.partners[0]])
    [found] = summarize(cache.path).teachers
    assert found.top1 == pytest.approx(np.mean(hits))


def test_answers_from_before_mixing_are_compared_with_the_images_own_labels(tmp_path: Path) -> None:
    views = {"num_views": 2, "mixing": [{"kind": "mixup"}], "targets": "linear"}
    cache = open_cache(fill(tmp_path / "linear", {"a": 0}, Pixels(COUNT, CLASSES), views=views))
    [found] = summarize(cache.path).teachers
    assert found.top1 == pytest.approx(np.mean(probabilities(cache, "a").argmax(axis=2) == cache.labels))


def test_without_labels_there_is_no_accuracy(tmp_path: Path) -> None:
    result = summarize(fill(tmp_path / "plain", {"a": 0, "b": 1}, Pixels(COUNT)))
    assert {item.top1 for item in result.teachers} == {item.top5 for item in result.teachers} == {None}
    assert (result.labelled_row_views, result.per_class) == (0, ())
    assert result.agreement[0].agreement < 1
    assert all(item.entropy > 0 for item in result.teachers)


def test_teachers_of_other_classes_make_no_ensemble(tmp_path: Path) -> None:
    plan = recipe(tmp_path / "c", teachers={"a": teacher(DENSE32), "b": teacher(DENSE32)})
    precompute(plan, teachers={"a": Linear(CLASSES), "b": Linear(3)}, dataset=Pixels(COUNT))
    result = summarize(tmp_path / "c")
    assert {name: item.classes for name, item in by_name(result).items()} == {"a": 6, "b": 3}


def test_features_are_no_answers(tmp_path: Path) -> None:
    features = {"all": {"kind": "pooled", "tap": "1"}}
    modules = {name: nn.Sequential(nn.Flatten(), nn.Linear(48, CLASSES)) for name in ("a", "b")}
    both = {"a": teacher(DENSE32, features=features), "b": teacher(DENSE32) | {"logits": None, "features": features}}
    precompute(recipe(tmp_path / "some", teachers=both), teachers=modules, dataset=Pixels(COUNT, CLASSES))
    assert list(by_name(summarize(tmp_path / "some"))) == ["a"]
    precompute(
        recipe(tmp_path / "none", teachers={"b": both["b"]}), teachers={"b": modules["b"]}, dataset=Pixels(COUNT)
    )
    with pytest.raises(CacheError, match="features alone"):
        summarize(tmp_path / "none")


def test_memory_is_bounded_by_shards_whatever_their_number(tmp_path: Path) -> None:
    views = {"num_views": 8}
    path = fill(tmp_path / "c", {"a": 0, "b": 1}, Pixels(1024, CLASSES), batch_size=512, shard_rows=512, views=views)
    peaks = []
    for number in (1, 2, 8):  # the first also pays for what is imported late
        tracemalloc.start()
        assert len(summarize(path, number).per_view) == number
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] - peaks[1] < 8 * 512 * CLASSES * 4, peaks


def test_the_command_prints_tables_or_one_document(labelled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["summary", str(labelled), "-q"]) == 0
    text = capsys.readouterr().out
    assert "teachers:" in text
    assert "per_view:" in text
    assert main(["summary", str(labelled), "--views", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(dataclasses.asdict(summarize(labelled, 1))))


def test_classes_have_the_names_that_the_manifest_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_images(tmp_path / "images", {"kaffee": 3, "tee \u00e9": 4})
    run(tmp_path / "c", ImageFolder(root=str(folder)), Linear(2), teachers={"t": teacher(PACKED32)})
    manifest = open_cache(tmp_path / "c").manifest
    assert manifest.class_names == ("kaffee", "tee \u00e9")
    rows = summarize(tmp_path / "c").per_class
    assert [(row["label"], row["name"], row["row_views"]) for row in rows] == [(0, "kaffee", 6), (1, "tee \u00e9", 8)]
    assert main(["summary", str(tmp_path / "c")]) == 0
    assert "tee \u00e9" in capsys.readouterr().out


def test_names_of_classes_change_no_digest_of_what_was_stored_before(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", {"a": 3, "b": 4})
    run(tmp_path / "c", ImageFolder(root=str(folder)), Linear(2), teachers={"t": teacher(PACKED32)})
    manifest = open_cache(tmp_path / "c").manifest
    before = manifest.model_copy(update={"class_names": None})
    assert "class_names" not in before.model_dump(mode="json")
    assert before.content_digest() == manifest.content_digest()
    stored = manifest.model_dump(mode="json")
    with pytest.raises(ValueError, match="class names other than"):
        Manifest.model_validate_json(json.dumps(stored | {"class_names": ["a", "c"]}))


def test_names_that_no_manifest_can_hold_are_not_recorded() -> None:
    assert recordable(None) is recordable(["caf\udce9"]) is recordable(["x" * 2**20, "y"]) is None
    assert recordable(["x" * 2**20]) == ("x" * 2**20,)
