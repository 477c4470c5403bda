"""The comparison of cells: its statistics against scipy, its formats, and what it leaves out."""

import csv
import io
import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from logitcache.student.runs.run_result import RunResult
from logitcache.student.training_recipes import StudentRecipe
from logitcache.sweeps.cells import SweepStudent
from logitcache.sweeps.comparison.comparison import Comparison, Difference, compare, holm, sign_test
from logitcache.sweeps.comparison.student_t import quantile, two_sided
from logitcache.sweeps.comparison.table_formats import TableFormat, format_table
from logitcache.sweeps.outcomes import Outcome
from tests.student.small import recipe

RESULT: dict[str, Any] = {
    **{"out": "run", "epochs": 2, "steps": 2, "images": 2, "seconds": 1.0, "num_parameters": 1, "loss": 0.5},
    **{"top1": None, "top5": None, "best_top1": None, "agreement": None, "teacher_passes": 0},
}
TOP1 = {"base": [0.5, 0.6, 0.7, 0.55], "better": [0.6, 0.68, 0.82, 0.63], "worse": [0.4, 0.61, 0.6, 0.5]}


def member(cell: str, seed: int) -> SweepStudent:
    return SweepStudent(cell, seed, recipe(StudentRecipe, out=f"runs/{cell},{seed}", cache="cache", epochs=2))


def outcomes(top1: Mapping[str, list[float | None]]) -> dict[SweepStudent, Outcome]:
    """Finished students of cells, one a seed; None if it failed."""
    found = {}
    for cell, values in top1.items():
        for seed, value in enumerate(values):
            rows = ({"epoch": 0, "loss": 1.0, "val_top1": 0.9}, {"epoch": 1, "loss": 0.5, "val_top1": value})
            done = Outcome("finished", 2, RunResult(**RESULT | {"best_top1": 0.9}), rows=rows)
            found[member(cell, seed)] = Outcome("failed", 1) if value is None else done
    return found


@given(st.floats(-60, 60), st.integers(1, 300))
def test_probabilities_of_t_are_scipys(t: float, freedom: int) -> None:
    assert two_sided(t, freedom) == pytest.approx(2 * stats.t.sf(abs(t), freedom), rel=1e-9)


@given(st.sampled_from([0.5, 0.8, 0.9, 0.95, 0.99, 0.999]), st.integers(1, 300))
def test_quantiles_of_t_are_scipys(confidence: float, freedom: int) -> None:
    assert quantile(confidence, freedom) == pytest.approx(stats.t.ppf((1 + confidence) / 2, freedom), rel=1e-9)


@given(st.integers(0, 20), st.integers(0, 20))
def test_the_sign_test_is_scipys(above: int, below: int) -> None:
    expected = stats.binomtest(above, above + below).pvalue if above + below else 1.0
    assert sign_test(above, below) == pytest.approx(expected)


def test_differences_are_paired_by_seed() -> None:
    compared = compare(outcomes(TOP1))
    base, better, worse = compared.rows
    assert (compared.metric, compared.baseline, compared.comparisons) == ("top1", "base", 2)
    assert base.difference is None
    found = better.difference
    assert found is not None
    pairs = np.array(TOP1["better"]) - np.array(TOP1["base"])
    paired = stats.ttest_rel(TOP1["better"], TOP1["base"])
    assert (found.seeds, found.above) == (4, 4)
    assert found.mean == pytest.approx(pairs.mean())
    assert found.deviation == pytest.approx(pairs.std(ddof=1))
    assert found.p == pytest.approx(paired.pvalue)
    interval = paired.confidence_interval(0.95)
    assert (found.low, found.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    assert found.p_sign == pytest.approx(stats.binomtest(4, 4).pvalue)
    assert worse.difference is not None
    # The spread between seeds is far wider than that of the differences: pairing removes it.
    assert found.deviation < statistics.stdev(TOP1["base"]) / 2


def test_best_and_last_epoch_are_different_columns() -> None:
    row = compare(outcomes(TOP1)).rows[0]
    assert row.measures["top1"].mean == pytest.approx(np.mean(TOP1["base"]))
    assert row.measures["top1"].deviation == pytest.approx(np.std(TOP1["base"], ddof=1))
    assert row.measures["best_top1"].mean == 0.9


def test_a_seed_that_failed_in_one_cell_is_in_no_difference() -> None:
    top1: dict[str, list[float | None]] = {"base": [0.5, 0.6, 0.7, 0.55], "other": [0.7, None, 0.75, 0.6]}
    row = compare(outcomes(top1)).rows[1]
    assert row.seeds == 3
    assert row.difference is not None
    assert row.difference.seeds == 3
    assert row.difference.mean == pytest.approx((0.2 + 0.05 + 0.05) / 3)


@pytest.mark.parametrize("count", [1, 2])
def test_no_interval_is_given_of_fewer_than_three_seeds(count: int) -> None:
    found = Difference.of([0.1, 0.2][:count])
    assert (found.low, found.high, found.p, found.p_sign) == (None, None, None, None)
    assert (found.deviation is None) == (count == 1)


def test_equal_differences_have_no_deviation_to_divide_by() -> None:
    assert Difference.of([0.0, 0.0, 0.0]).p == 1.0
    assert Difference.of([0.1, 0.1, 0.1]).p == 0.0


def test_holm_corrects_for_the_number_of_comparisons() -> None:
    assert holm([0.01, None, 0.04, 0.03]) == [pytest.approx(0.03), None, pytest.approx(0.06), pytest.approx(0.06)]
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.fixture
def comparison() -> Comparison:
    return compare(outcomes(TOP1), "base", {"better": 0.0012})


def test_csv_and_json_have_every_figure(comparison: Comparison) -> None:
    rows = list(csv.DictReader(io.StringIO(format_table(comparison, "csv"))))
    document = json.loads(format_table(comparison, "json"))
    assert [row["cell"] for row in rows] == ["base", "better", "worse"]
    for flat, row in zip(rows[1:], document["rows"][1:], strict=True):
        assert float(flat["top1_mean"]) == row["measures"]["top1"]["mean"]
        for key in ("mean", "low", "high", "p", "p_holm", "p_sign"):
            assert float(flat[f"difference_{key}"]) == row["difference"][key]
    assert rows[0]["difference_mean"] == ""
    assert float(rows[1]["target_error"]) == 0.0012


def test_markdown_is_a_table_with_its_notes(comparison: Comparison) -> None:
    lines = format_table(comparison, "markdown").splitlines()
    assert len({line.count("|") for line in lines[:5]}) == 1
    assert "| better | 4 | 0.0012 | 68.25 ± " in lines[3]
    assert "2 comparisons" in lines[-1]


def test_latex_escapes_what_it_would_obey() -> None:
    text = format_table(compare(outcomes({"a_b": [0.5, 0.6], "c&d": [0.6, 0.7]})), "latex")
    assert r"a\_b & 2 & " in text
    assert r"c\&d" in text
    assert r"less a\_b" in text
    assert r"$\pm$" in text
    assert text.count(r"\\") == 3
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len({line.replace(r"\&", "").count("&") for line in rows}) == 1


def test_nothing_that_is_finished_is_compared_with_nothing() -> None:
    compared = compare(outcomes({"base": [None], "other": [None]}))
    assert (compared.metric, compared.comparisons) == (None, 0)
    for form in get_args(TableFormat):
        assert format_table(compared, form) is not None
    assert math.isfinite(len(format_table(compared, "markdown")))


def test_cells_keep_the_order_of_the_recipe(tmp_path: Path) -> None:
    assert [row.cell for row in compare(outcomes(dict(reversed(TOP1.items())))).rows] == ["worse", "better", "base"]
