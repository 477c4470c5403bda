"""Reports: one page on runs, folders of runs and caches; a browser opens it without complaint."""

import html
import json
import re
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import torch
import yaml

from logitcache.cli.app import main
from logitcache.config.recipe import load_recipe
from logitcache.report.page.maps import cka, shared_neighbours
from logitcache.report.page.measured import measure_run
from logitcache.report.page.model_sections import sections_of_models
from logitcache.report.page.report import write_report
from logitcache.report.page.run_files import RunFiles, read_runs, varying
from logitcache.student.evaluation.evaluate import evaluate
from logitcache.student.training import train
from logitcache.sweeps.comparison.table_formats import format_table, shown_rows
from logitcache.sweeps.sweep import SweepResult, read_sweep, sweep
from logitcache.sweeps.sweep_recipe import SweepRecipe
from tests.student.small import TEST_IMAGES, TINY, fill, network, student
from tests.student.test_one_class import OneClass, OneLogit

pytest.importorskip("matplotlib", reason="reports need the extra report")

HOSTILE = "t<script>alert(1)</script>&"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache to learn from, one to measure on, and a run."""
    folder = tmp_path_factory.mktemp("report")
    logits = {"kind": "top_k", "k": 4}
    fill(folder / "train.zarr", {"net": network()}, logits)
    fill(folder / "test.zarr", {"net": network()}, {"kind": "dense"}, TEST_IMAGES, views={})
    train(student(folder / "run", folder / "train.zarr", validation={"cache": str(folder / "test.zarr")}))
    return folder


def copied(run: Path, out: Path, epochs: int, **keys: Any) -> Path:
    """Copy a run with another recipe, and metrics and accuracy that depend on its keys."""
    shutil.copytree(run, out)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["losses"][0]["temperature"] = keys["temperature"]
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"seed": keys["seed"], "batch_size": keys["batch_size"]}))
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    quality = 0.5 + keys["temperature"] / 20 + keys["seed"] / 1000
    rows = [
        first | {"epoch": e, "loss": 1 / (1 + e + keys["seed"]), "val_top1": quality * e / epochs}
        for e in range(epochs)
    ]
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = json.loads((run / "result.json").read_text())
    (out / "result.json").write_text(
        json.dumps(result | {"top1": quality, "num_parameters": 1000 * keys["batch_size"]})
    )
    return out


@pytest.fixture(scope="module")
def twelve(world: Path) -> Path:
    """Twelve runs that differ in temperature, batch size and seed."""
    for t in (1.0, 2.0, 4.0):
        for size in (32, 64):
            for seed in (0, 1):
                copied(
                    world / "run", world / f"twelve/{t:g}-{size}-{seed}", 5, temperature=t, batch_size=size, seed=seed
                )
    return world / "twelve"


@pytest.fixture(scope="module")
def hundred(world: Path) -> Path:
    for number in range(100):
        keys = {"temperature": 1.0 + number // 20, "batch_size": 16 * (1 + number // 4 % 5), "seed": number % 4}
        copied(world / "run", world / f"hundred/a/{number:03}", 100, **keys)
    return world / "hundred"


def test_the_page_of_twelve_runs_and_a_cache_opens_without_complaint(world: Path, twelve: Path, tmp_path: Path) -> None:
    browser = pytest.importorskip("tests.report.browser", reason="the browser is driven through aiohttp")
    if browser.PROGRAM is None:
        pytest.skip("no Chromium on this machine")
    found = write_report([twelve, world / "train.zarr"], tmp_path / "r.html", measure=2, points=60, latency=True)
    assert (found.runs, found.caches, len(found.measured)) == (12, 1, 2)
    page = tmp_path / "r.html"
    headings = "[...document.querySelectorAll('h2')].map(h => h.textContent)"
    background = "getComputedStyle(document.body).backgroundColor"
    light = browser.look(page, expressions=(headings, background))
    dark = browser.look(page, scheme="dark", expressions=(headings, background))
    for seen in (light, dark):
        assert seen.errors == []
        assert set(seen.requests) == {page.as_uri()}
        assert all(scrolled <= width for width, scrolled in seen.widths.items())
        assert seen.pdf.startswith(b"%PDF")
    assert light.values[1] != dark.values[1]
    wanted = ["Comparison", "Heat maps", "Curves", "Validation", "Confusion against the teacher", "Representations"]
    wanted += ["Teachers", "Views as the teacher saw them", "Encoding errors", "Representations of the teachers"]
    assert set(wanted) <= set(light.values[0])
    text = page.read_text()
    for title in ("accuracy by parameters", "accuracy by latency", "PCA: teacher net", "t-SNE: ", "CKA", "over seeds"):
        assert title in text, title


def test_the_page_of_a_hundred_runs_is_small_and_opens(hundred: Path, tmp_path: Path) -> None:
    browser = pytest.importorskip("tests.report.browser", reason="the browser is driven through aiohttp")
    found = write_report([hundred], tmp_path / "r.html", measure=0)
    assert (found.runs, found.measured) == (100, ())
    assert found.bytes == (tmp_path / "r.html").stat().st_size < 10_000_000
    if browser.PROGRAM is None:
        pytest.skip("no Chromium on this machine")
    seen = browser.look(tmp_path / "r.html")
    assert (seen.errors, set(seen.requests)) == ([], {(tmp_path / "r.html").as_uri()})
    assert all(scrolled <= width for width, scrolled in seen.widths.items())


def test_figures_of_a_run_are_what_evaluate_measures(world: Path) -> None:
    run = world / "run"
    measured = measure_run(run, "run", (), 60, False)
    evaluated = evaluate(run)
    sections = {section.title: section for section in sections_of_models([measured])}
    by_class, calibration = sections["Validation"].figures
    assert [row["run"] for row in by_class.rows] == [one.top1 for one in evaluated.per_class]
    bins = [row for row in calibration.rows if row["model"] == "run" and row["images"]]
    gaps = [row["images"] * abs(row["accuracy"] - row["confidence"]) for row in bins]
    assert sum(gaps) / evaluated.images == pytest.approx(evaluated.measures.ece)
    (table,) = sections["Validation"].tables
    assert table.rows[0]["top1"] == evaluated.measures.top1
    assert table.rows[1]["top1"] == evaluated.measures.teacher_top1  # type: ignore[union-attr]
    assert measured.beside is not None
    beside = measured.beside
    (confusion,) = sections["Confusion against the teacher"].figures
    assert sum(row["images"] for row in confusion.rows) == 60
    agreeing = sum(row["images"] for row in confusion.rows if row["student"] == row["teacher"])
    assert agreeing == (beside.student.argmax(1) == beside.teachers["net"].argmax(1)).sum()


def test_cka_and_neighbours_are_those_of_other_ways() -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(50, 6)).astype(np.float32)
    y = (x[:, :4] + 0.3 * generator.normal(size=(50, 4))).astype(np.float32)
    gram = [(v - v.mean(0)).astype(np.float64) @ (v - v.mean(0)).astype(np.float64).T for v in (x, y)]
    wanted = (gram[0] * gram[1]).sum() / np.sqrt((gram[0] ** 2).sum() * (gram[1] ** 2).sum())
    assert cka(x, y) == pytest.approx(wanted)
    neighbors = pytest.importorskip("sklearn.neighbors")
    near = [neighbors.NearestNeighbors(n_neighbors=10).fit(v).kneighbors(return_distance=False) for v in (x, y)]
    shared = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(*near, strict=True)])
    assert shared_neighbours(x, y) == pytest.approx(shared)
    assert shared_neighbours(x, 2 * x) == 1.0


def test_runs_are_compared_by_the_keys_in_which_they_differ(twelve: Path, tmp_path: Path) -> None:
    runs = read_runs(sorted(twelve.iterdir()))
    assert sorted(varying(runs)) == ["batch_size", "losses.0.temperature", "seed"]
    assert [run.name for run in runs] == sorted(path.name for path in twelve.iterdir())
    write_report([twelve], tmp_path / "r.html", measure=0)
    text = (tmp_path / "r.html").read_text()
    (table,) = re.findall(r"<caption>over seeds.*?</table>", text, re.DOTALL)
    assert table.count("<tr>") == 1 + 6
    assert "accuracy by batch_size and losses.0.temperature" in text


@pytest.fixture(scope="module")
def swept(world: Path) -> tuple[Path, SweepResult]:
    """A sweep of three cells and three seeds, of which halving ends one cell."""
    entries = {"cache": str(world / "train.zarr"), "model": TINY, "epochs": 2, "batch_size": 32, "num_workers": 0}
    entries |= {"device": "cpu", "order_seed": 0, "validation": {"cache": str(world / "test.zarr")}}
    entries |= {"losses": [{"kind": "kl_divergence"}], "optimizer": {"kind": "adamw", "lr": 0.01}}
    more = {"grid": {"losses.0.temperature": [1, 4, 8]}, "seeds": 3, "halving": {"epochs": [1], "keep": 0.6}}
    recipe = load_recipe({"kind": "sweep", "student": entries, "inexact_targets": "warn"} | more, SweepRecipe)
    return world / "sweep", sweep(recipe, world / "sweep")


@pytest.mark.filterwarnings("ignore::logitcache.errors.TargetErrorWarning")
def test_the_page_of_a_sweep_has_the_table_of_the_sweep(swept: tuple[Path, SweepResult], tmp_path: Path) -> None:
    folder, result = swept
    assert read_sweep(folder) == result
    assert len(result.stopped) == 3
    write_report([folder], tmp_path / "r.html", measure=0)
    text = html.unescape((tmp_path / "r.html").read_text())
    (table,) = re.findall(r"<caption>cells.*?</table>", text, re.DOTALL)
    cells = re.findall(r"<td>(.*?)</td>", table)
    assert cells == [text for row in shown_rows(result.comparison) for text in row.values()]
    assert any("±" in cell for cell in cells)
    assert quote(format_table(result.comparison, "csv"), safe=" ,.:/") in text
    (ended,) = re.findall(r"<caption>ended by halving.*?</table>", text, re.DOTALL)
    assert sorted(re.findall(r"<tr><td>(.*?)</td>", ended)) == sorted(result.stopped)
    assert "<caption>over seeds" not in text
    assert "9 students, 6 finished, 3 ended by halving; seeds share one order of images (order_seed 0)." in text
    write_report([folder.parent / "sweep/runs"], tmp_path / "runs.html", measure=0)
    assert "<caption>over seeds" in (tmp_path / "runs.html").read_text()


def test_the_page_of_a_search_has_its_trials(world: Path, tmp_path: Path) -> None:
    entries = {"cache": str(world / "train.zarr"), "model": TINY, "epochs": 1, "batch_size": 32, "num_workers": 0}
    entries |= {"device": "cpu", "validation": {"cache": str(world / "test.zarr")}}
    entries |= {"losses": [{"kind": "cross_entropy"}]}
    space = {"optimizer.lr": [0.01, 20.0], "model.width": [2, 3]}
    searching = {"kind": "random", "space": space, "trials": 3, "objectives": ["accuracy", "parameters"]}
    recipe = load_recipe({"kind": "sweep", "student": entries, "search": searching}, SweepRecipe)
    found = sweep(recipe, tmp_path / "search")
    write_report([tmp_path / "search"], tmp_path / "r.html", measure=0)
    text = html.unescape((tmp_path / "r.html").read_text())
    (table,) = re.findall(r"<caption>trials.*?</table>", text, re.DOTALL)
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in table.split("<tr>") if "<td>" in row]
    states = [(row[1], row[2], "yes" in row) for row in rows]
    assert states == [(trial.cell, trial.state, trial.is_front) for trial in found.trials]
    assert any(is_front for *_, is_front in states)
    for row, trial in zip(rows, found.trials, strict=True):
        assert str(int(trial.values["parameters"])) in [cell.replace(",", "") for cell in row]


@pytest.mark.filterwarnings("ignore::logitcache.errors.TargetErrorWarning")
def test_a_damaged_table_of_a_sweep_is_named(
    swept: tuple[Path, SweepResult], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(swept[0], tmp_path / "sweep")
    (copy / "sweep.json").write_text('{"out": 3}')
    assert main(["report", str(copy), "--measure", "0", "--out", str(tmp_path / "r.html")]) == 3
    assert f"{copy / 'sweep.json'} is damaged" in capsys.readouterr().err
    (copy / "sweep.json").unlink()
    write_report([copy], tmp_path / "r.html", measure=0)
    assert "<caption>over seeds" in (tmp_path / "r.html").read_text()


def test_what_another_kind_implies_is_no_difference() -> None:
    def run(name: str, **recipe: Any) -> RunFiles:
        return RunFiles(Path(name), name, recipe, [], {}, [], {})

    runs = [
        run("a", **{"losses.0.kind": "dkd", "losses.0.beta": 8.0, "losses.0.weight": 1.0, "validation": None}),
        run("b", **{"losses.0.kind": "kl", "losses.0.temperature": 2.0, "losses.0.weight": 0.5, "validation.every": 1}),
        run("c", **{"losses.0.kind": "kl", "losses.0.temperature": 4.0, "losses.0.weight": 0.5, "validation.every": 1}),
    ]
    assert varying(runs) == [
        *("losses.0.kind", "losses.0.weight", "validation", "losses.0.temperature", "validation.every")
    ]


def test_names_of_runs_and_classes_are_text(world: Path, tmp_path: Path) -> None:
    hostile = copied(world / "run", tmp_path / HOSTILE, 3, temperature=2.0, batch_size=32, seed=0)
    names = json.loads((hostile / "environment.json").read_text())
    (hostile / "environment.json").write_text(json.dumps(names | {"learns_from": {HOSTILE: HOSTILE}}))
    write_report([hostile], tmp_path / "r.html", measure=1, points=30)
    text = (tmp_path / "r.html").read_text()
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_names_that_are_no_utf8_are_shown_and_in_the_tables(world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "r\udcff"
    copied(world / "run", folder / "b\udcfe", 3, temperature=2.0, batch_size=32, seed=0)
    write_report([folder, world / "run"], tmp_path / "r.html", measure=0)
    assert b"b\xfe" in (tmp_path / "r.html").read_bytes()
    assert b"b%FE" in (tmp_path / "r.html").read_bytes()


@pytest.mark.parametrize("count", [1, 40])
def test_one_image_and_one_class_have_no_map(tmp_path: Path, count: int) -> None:
    teachers = {"a": OneLogit(), "b": OneLogit()}
    fill(tmp_path / "c.zarr", teachers, images=OneClass(count=count), views={})
    write_report([tmp_path / "c.zarr"], tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert "Representations of the teachers" in text
    assert "PCA: " not in text
    assert ("shared neighbours" in text) == (count > 1)


def test_an_unfinished_run_is_shown_as_one_and_not_measured(world: Path, tmp_path: Path) -> None:
    begun = copied(world / "run", tmp_path / "begun", 3, temperature=2.0, batch_size=32, seed=0)
    (begun / "result.json").unlink()
    found = write_report([begun, world / "run"], tmp_path / "r.html", measure=5, points=30)
    assert found.measured == (f"{world.name}/run",) or len(found.measured) == 1
    text = (tmp_path / "r.html").read_text()
    assert re.search(r"Not finished: \S*begun", text)


def test_a_run_that_cannot_be_measured_is_named_with_the_reason(world: Path, tmp_path: Path) -> None:
    gone = copied(world / "run", tmp_path / "gone", 3, temperature=2.0, batch_size=32, seed=0)
    recipe = yaml.safe_load((gone / "recipe.yaml").read_text())
    recipe["validation"]["cache"] = str(tmp_path / "nowhere.zarr")
    (gone / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    write_report([gone], tmp_path / "r.html")
    assert "nowhere.zarr" in (tmp_path / "r.html").read_text().partition('id="validation"')[2]


def test_what_is_nothing_of_these_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "r.html")]) == 2
    assert "Fix: name the `out:` of a training" in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()


def test_the_command_prints_what_it_wrote(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r.html"
    assert main(["report", str(world / "run"), "--out", str(out), "--measure", "0", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    counts = {"runs": 1, "files": 0, "caches": 0}
    assert document == {"out": str(out), "bytes": out.stat().st_size, **counts, "measured": []}


def test_the_state_of_random_numbers_is_untouched(world: Path, tmp_path: Path) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index,union-attr]
    write_report([world / "run"], tmp_path / "r.html", points=30)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # type: ignore[index]
