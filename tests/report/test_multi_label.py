"""What inspect and summary say of a cache of images of any number of classes, against plain loops over its answers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitcache.cache.cache import Cache, open_cache
from logitcache.logits import dense_logits
from logitcache.report import inspect as inspecting
from logitcache.report import multi_label_summary
from logitcache.report.inspect import inspect_cache
from logitcache.report.multi_label_summary import ENSEMBLE, MultiLabelTeacher
from logitcache.report.page.report import write_report
from logitcache.report.summary import summarize
from logitcache.stage_one.precompute import precompute
from logitcache.views.keys import ViewKey
from tests.cache.made import DENSE32, TOP2, Linear, recipe, teacher
from tests.cache.test_multi_label import CLASSES, COUNT, Marked
from tests.student.test_multi_label_measures import average_precision, f1

SEEDS = {"a": 0, "b": 1}
Table = np.ndarray[Any, Any]


def fill(path: Path, logits: dict[str, Any], **changes: Any) -> Path:
    plan = recipe(
        path, teachers={name: teacher(entry) for name, entry in logits.items()}, **({"shard_rows": 64} | changes)
    )
    precompute(plan, teachers={name: Linear(CLASSES, seed=SEEDS[name]) for name in logits}, dataset=Marked())
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("marked") / "two", {"a": DENSE32, "b": DENSE32})


@pytest.fixture(autouse=True)
def _few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multi_label_summary, "ROWS", 70)
    monkeypatch.setattr(inspecting, "ROWS", 70)


def answers(cache: Cache, name: str, view: int) -> Table:
    keys = [ViewKey(view, index) for index in range(len(cache))]
    return np.asarray(dense_logits(cache.answers(keys)[name]).double().numpy())


def precisions(logits: Table, labels: Table) -> list[float]:
    found = [average_precision(logits[:, c].tolist(), labels[:, c].tolist()) for c in range(CLASSES)]
    return [value for value in found if value is not None]


def test_figures_are_those_of_a_plain_loop(path: Path) -> None:
    result, cache, labels = summarize(path), open_cache(path), Marked().table
    assert all(isinstance(one, MultiLabelTeacher) for one in result.teachers)
    assert (result.images, result.views, result.labelled_row_views) == (COUNT, 2, 2 * COUNT)
    said = {item.teacher: item for item in result.teachers}
    assert list(said) == ["a", "b", ENSEMBLE]
    z = {name: [answers(cache, name, view) for view in range(2)] for name in SEEDS}
    p = {name: [1 / (1 + np.exp(-values)) for values in z[name]] for name in SEEDS}
    p[ENSEMBLE] = [(a + b) / 2 for a, b in zip(p["a"], p["b"], strict=True)]
    for name, views in p.items():
        by_view = [precisions(values, labels) for values in views]
        assert said[name].mean_ap == pytest.approx(np.mean(by_view))
        assert [row[name] for row in result.per_view] == pytest.approx(np.mean(by_view, axis=1))
        assert [row[name] for row in result.per_class] == pytest.approx(np.mean(by_view, axis=0))
        micro = [f1(values.flatten().tolist(), labels.flatten().tolist(), 0.5) for values in views]
        assert said[name].f1_micro == pytest.approx(np.mean(micro))
    assert [row["images"] for row in result.per_class] == (labels == 1).sum(axis=0).tolist()
    [pair] = result.agreement
    agreeing = [(a > 0) == (b > 0) for a, b in zip(z["a"], z["b"], strict=True)]
    assert (pair.first, pair.second, pair.agreement) == ("a", "b", pytest.approx(np.mean(agreeing)))


def test_inspect_tells_the_precision_on_the_first_view(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = inspect_cache(path)["teachers"]
    cache, labels = open_cache(path), Marked().table
    for name in SEEDS:
        assert "top1" not in shown[name]
        assert shown[name]["mean_ap"] == pytest.approx(np.mean(precisions(answers(cache, name, 0), labels)))
    monkeypatch.setattr(inspecting, "LOOKED_AT", 100 * CLASSES)
    # Batches end with their shards.
    expected = precisions(answers(cache, "a", 0)[:128], labels[:128])
    assert inspect_cache(path)["teachers"]["a"]["mean_ap"] == pytest.approx(np.mean(expected))


def test_what_a_few_classes_say_is_not_told(tmp_path: Path) -> None:
    path = fill(tmp_path / "c", {"a": TOP2}, shard_rows=None)
    assert inspect_cache(path)["teachers"]["a"]["mean_ap"] is None
    result = summarize(path)
    assert all(isinstance(one, MultiLabelTeacher) for one in result.teachers)
    assert [(item.teacher, item.mean_ap) for item in result.teachers] == [("a", None)]
    pytest.importorskip("matplotlib", reason="reports need the extra report")
    write_report([path], tmp_path / "r.html")
    assert "The images cannot be shown" in (tmp_path / "r.html").read_text()


def test_a_page_has_the_classes_of_the_teachers_whose_logits_are_all_kept(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="reports need the extra report")
    path = fill(tmp_path / "c", {"a": TOP2, "b": DENSE32}, shard_rows=None)
    write_report([path], tmp_path / "r.html")
    assert "accuracy by class" in (tmp_path / "r.html").read_text()


def test_a_mixed_image_has_the_labels_of_its_larger_part(tmp_path: Path) -> None:
    views = {"num_views": 1, "seed": 5, "mixing": [{"kind": "cutmix"}]}
    cache = open_cache(fill(tmp_path / "c", {"a": DENSE32}, views=views))
    keys, labels = [ViewKey(0, index) for index in range(COUNT)], Marked().table
    spec = cache.manifest.views
    mixture = spec.mixture(keys, spec.partners(COUNT, COUNT), (4, 4))
    assert mixture is not None
    seen = labels.copy()
    for index in range(COUNT):
        if mixture.share[index] < 0.5:
            seen[index] = labels[mixture.partners[index]]
    result = summarize(cache.path, 1)
    assert all(isinstance(one, MultiLabelTeacher) for one in result.teachers)
    assert result.teachers[0].mean_ap == pytest.approx(np.mean(precisions(answers(cache, "a", 0), seen)))
