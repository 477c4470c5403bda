"""Figures: pure functions from rows to SVG, with their data."""

import csv
import re
from xml.etree import ElementTree

import numpy as np
import pytest

import logitcache as lc
from logitcache.report.figures.pareto import front

pytest.importorskip("matplotlib", reason="figures need the extra report")

ROWS = [{"run": f"r{n}", "epoch": e, "loss": 1.0 / (n + e + 1)} for n in range(3) for e in range(4)]
MANY = [{"run": f"r{n}", "epoch": e, "loss": 1.0 / (n + e + 1)} for n in range(100) for e in range(4)]
CELLS = [{"T": t, "w": w, "top1": t * w} for t in (1, 2, 4) for w in (0.1, 0.5)]
CLASSES = [{"name": f"class {c}", "a": c / 40, "b": None if c == 3 else 1 - c / 40} for c in range(40)]
BINS = [{"model": "m", "bin": b, "images": b, "confidence": b / 5, "accuracy": b / 6} for b in range(5)]
POINTS = [{"x": n * 0.1, "y": -n, "class": n % 3} for n in range(30)]
CHANGES = [
    {"cell": f"c{n}", "mean": n - 20.0, "low": None if n == 3 else n - 21.0, "high": n - 19.0} for n in range(50)
]
COSTS = [{"run": f"r{n}", "cost": 10.0**n, "top1": [0.5, 0.4, 0.9][n]} for n in range(3)]
FIGURES = {
    "curves": lambda: lc.figures.curves(ROWS, "loss"),
    "many curves": lambda: lc.figures.curves(MANY, "loss", log=True),
    "heat map": lambda: lc.figures.heat_map(CELLS, "T", "w", "top1"),
    "per class": lambda: lc.figures.per_class(CLASSES, ["a", "b"]),
    "intervals": lambda: lc.figures.intervals(CHANGES),
    "reliability": lambda: lc.figures.reliability(BINS),
    "embedding": lambda: lc.figures.embedding(POINTS),
    "pareto": lambda: lc.figures.pareto(COSTS, "cost", "top1"),
    "picture": lambda: lc.figures.picture(np.full((3, 8, 6), 7, np.uint8), ROWS),
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_one_svg_without_links_and_the_same_again(name: str) -> None:
    figure = FIGURES[name]()
    assert figure == FIGURES[name]()
    assert figure._repr_svg_() == figure.svg
    root = ElementTree.fromstring(figure.svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    links = re.findall(r'href="([^"]+)"', figure.svg)
    assert all(link.startswith(("#", "data:image/")) for link in links)
    ids = re.findall(r' id="([^"]+)"', figure.svg)
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
    assert "#010203" not in figure.svg


@pytest.mark.parametrize("name", sorted(FIGURES.keys() - {"picture"}))
def test_text_takes_the_colour_of_the_page_and_numbers_are_plain(name: str) -> None:
    figure = FIGURES[name]()
    assert "currentColor" in figure.svg
    assert "mathdefault" not in figure.svg


def test_the_data_of_a_figure_are_its_rows() -> None:
    figure = lc.figures.curves(ROWS, "loss")
    read = list(csv.DictReader(figure.csv.splitlines()))
    assert [(row["run"], int(row["epoch"])) for row in read] == [(row["run"], row["epoch"]) for row in ROWS]
    np.testing.assert_allclose([float(row["loss"]) for row in read], [row["loss"] for row in ROWS], rtol=1e-5)


def test_ids_of_two_figures_on_one_page_differ() -> None:
    first, second = lc.figures.curves(ROWS, "loss"), lc.figures.curves(ROWS[:8], "loss")
    ids = [set(re.findall(r' id="([^"]+)"', figure.svg)) for figure in (first, second)]
    assert ids[0]
    assert not ids[0] & ids[1]


def test_names_are_shown_as_they_are_and_never_obeyed() -> None:
    name = '<script>alert("1")</script> $x_1$ & 图'
    rows = [row | {"run": f"{name} {row['run']}"} for row in ROWS]
    figure = lc.figures.curves(rows, "loss", title=name)
    assert "<script" not in figure.svg
    text = "".join(ElementTree.fromstring(figure.svg).itertext())
    assert "<script>" in text
    assert "图 r0" in text


def test_the_front_has_exactly_what_nothing_beats_at_both() -> None:
    generator = np.random.default_rng(0)
    rows = [{"cost": float(c), "top1": float(q)} for c, q in generator.integers(0, 9, (60, 2))]
    beaten = {
        n
        for n, row in enumerate(rows)
        for other in rows
        if other["cost"] <= row["cost"] and other["top1"] >= row["top1"] and other != row
    }
    chosen = front(rows, "cost", "top1")
    assert {tuple(rows[n].values()) for n in chosen} == {
        tuple(r.values()) for n, r in enumerate(rows) if n not in beaten
    }
    marked = lc.figures.pareto(COSTS, "cost", "top1").rows
    assert [row["front"] for row in marked] == [True, False, True]


def test_of_many_classes_the_worst_are_drawn_and_all_are_kept() -> None:
    figure = lc.figures.per_class(CLASSES, ["a", "b"])
    text = "".join(ElementTree.fromstring(figure.svg).itertext())
    assert "class 29" in text
    assert "class 30" not in text
    assert len(figure.rows) == 40


def test_a_model_without_the_worst_classes_of_the_first_has_no_dot() -> None:
    text = lc.figures.per_class([{"name": "cat", "a": 0.5}, {"name": "dog", "a": 0.7}], ["a", "b"]).svg
    assert ">b<" in text
