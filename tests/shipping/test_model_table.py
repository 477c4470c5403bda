"""One table of a chain of models beside their teacher: figures equal those of another way."""

import csv
import html
import io
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from torch.utils.flop_counter import FlopCounterMode

from logitcache.cli.app import main
from logitcache.errors import RecipeError
from logitcache.models import load_model
from logitcache.report.beside_teachers import compare_beside_teachers
from logitcache.report.page.report import write_report
from logitcache.shipping.model_table import ModelRow, ModelTable, compare_models
from logitcache.shipping.quantization.quantize import quantize
from logitcache.student.evaluation.cost import LatencyPlan
from logitcache.student.evaluation.evaluate import evaluate
from logitcache.student.training import train
from tests.shipping.test_export import answers, expected, pixels
from tests.student.small import TEST_IMAGES, student, teacher

pytest.importorskip("onnxscript", reason="exports need the extra export")
onnx: Any = pytest.importorskip("onnx")

ON_TEST = f"validation.dataset={json.dumps(TEST_IMAGES)}"
ON_MANY = 'validation.dataset={"kind": "bundled", "split": "test"}'
QUICK = ["--latency", "--batch-size", "2", "--threads", "1", "--repeats", "2", "--warm-up", "1"]


def by_name(table: ModelTable) -> dict[str, ModelRow]:
    return {row.model: row for row in table.models}


@pytest.fixture(scope="module")
def int8(run: Path, file: Path) -> Path:
    return Path(quantize(run, run.parent / "table.int8.onnx", num_images=16, least_agreement=0.0).file)


def test_a_file_has_the_figures_of_its_graph_and_names_the_run_that_it_was_made_from(
    run: Path, file: Path, int8: Path
) -> None:
    table = compare_models([run, file, int8], ["device=cpu"])
    rows = by_name(table)
    assert table.images == 100
    own, exported, rounded = (rows[str(path)] for path in (run, file, int8))
    assert own.parent is None
    assert [exported.parent, rounded.parent] == [str(run)] * 2
    assert own.measures == evaluate(run, ["device=cpu"]).measures
    images = pixels(100)
    logits = {path: answers(path, images.numpy()) for path in (file, int8)} | {run: expected(run, images)}
    best = {path: values.argmax(axis=1) for path, values in logits.items()}
    assert exported.parent_agreement == (best[file] == best[run]).mean()
    assert rounded.parent_agreement == (best[int8] == best[run]).mean()
    assert own.bytes == (run / "weights.safetensors").stat().st_size
    assert exported.bytes == file.stat().st_size
    assert [exported.arithmetic, rounded.arithmetic] == ["float32", "int8"]


def test_parameters_and_multiply_adds_are_those_of_the_network(run: Path, file: Path, int8: Path) -> None:
    module = load_model(run).module.eval()
    with FlopCounterMode(display=False) as counter:
        module(pixels(1).float())
    parameters = sum(value.numel() for value in module.parameters())
    for row in compare_models([run, file, int8], ["device=cpu"]).models:
        assert (row.num_parameters, row.macs) == (parameters, counter.get_total_flops() / 2)


def test_a_file_alone_is_measured_on_the_images_that_the_user_names(
    run: Path, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (row,) = compare_models([file], [ON_TEST, "num_workers=0"]).models
    assert asdict(row.measures) == pytest.approx(asdict(evaluate(run, ["device=cpu"]).measures), abs=1e-6)  # type: ignore[arg-type]
    assert row.parent is None
    assert main(["evaluate", str(file)]) == 2
    assert "Fix: --set validation.dataset" in capsys.readouterr().err


def test_the_table_of_a_pipeline_has_its_teacher_and_every_format(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two runs validated on a cache of the teacher's answers; the teacher's network is not at hand."""
    runs = [str(tmp_path / name) for name in ("one", "two")]
    train(student(Path(runs[0]), cache, epochs=1, validation={"cache": str(cache)}))
    train(student(Path(runs[1]), cache, epochs=1, validation={"cache": str(cache)}, seed=1))
    assert main(["evaluate", *runs, *QUICK, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    names = [row["model"] for row in document["models"]]
    assert names[:2] == runs
    assert names[2].startswith("teacher ")
    first, _, taught = document["models"]
    assert first["retention"] == pytest.approx(first["measures"]["top1"] / taught["measures"]["top1"])
    assert taught["measures"]["agreement"] is taught["retention"] is None
    assert [len(row["latencies"]) for row in document["models"]] == [1, 1, 0]
    assert main(["evaluate", *runs, "--table", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["model"] for row in rows] == names
    assert float(rows[0]["top1"]) == first["measures"]["top1"]
    assert main(["evaluate", runs[0], "--table", "markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith(f"| {runs[0]} |")
    assert len({line.count("|") for line in lines if line}) == 1


def test_speed_up_is_the_time_of_all_teachers_over_that_of_the_model(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from logitcache.models import Bundled, Classifier, resolve_preprocessing
    from logitcache.student.evaluation.cost import Contender

    built = Bundled().build(None, 1)
    wide = Contender(Classifier(built.module, resolve_preprocessing(built, None, who="x")), "float32")
    monkeypatch.setattr(
        "logitcache.shipping.model_table.median_seconds", lambda timed, *_: [0.5, 2.0, 4.0][: len(timed)]
    )
    plan = LatencyPlan(batch_sizes=(3,), threads=(1,))
    teachers: dict[str, Contender | None] = {"a": wide, "b": wide}
    rows = compare_models([run], ["device=cpu"], latency=plan, teachers=teachers).models
    assert [row.latencies[0].speed_up for row in rows] == [12.0, 3.0, 1.5]
    assert rows[1].num_parameters == sum(value.numel() for value in built.module.parameters())
    gone = compare_models([run], ["device=cpu"], latency=plan, teachers=teachers | {"c": None}).models
    assert [[each.speed_up for each in row.latencies] for row in gone] == [[None], [None], [None], []]


def test_models_of_other_classes_or_pixels_are_refused(run: Path, file: Path, tmp_path: Path) -> None:
    few = tmp_path / "few"
    train(teacher(few, dataset={"kind": "custom", "factory": "tests.student.small:ThreeClasses"}))
    with pytest.raises(RecipeError, match="other classes"):
        compare_models([run, few], ["device=cpu"])
    changed = tmp_path / "changed.onnx"
    model = onnx.load(file)
    (entry,) = model.metadata_props
    found = json.loads(entry.value)
    found["evaluation"]["augmentations"] = [{"kind": "resize", "size": 30}, {"kind": "center_crop", "size": 28}]
    entry.value = json.dumps(found)
    changed.write_bytes(model.SerializeToString())
    with pytest.raises(RecipeError, match="other augmentations"):
        compare_models([run, changed], ["device=cpu"])
    assert len(compare_models([run, changed], ["device=cpu", "validation.augmentations=[]"]).models) == 2


def test_a_run_that_states_a_huge_size_is_refused_wherever_it_stands(run: Path, tmp_path: Path) -> None:
    huge = tmp_path / "huge"
    shutil.copytree(run, huge)
    stored = json.loads((huge / "model.json").read_text())
    stored["preprocessing"]["input_size"] = [2048, 2048]
    (huge / "model.json").write_text(json.dumps(stored))
    for models in ([run, huge], [huge, run]):
        with pytest.raises(RecipeError, match="resizes images to"):
            compare_models(models, ["device=cpu", "validation.batch_size=1000000", ON_MANY])


def test_hostile_and_pickled_files_are_refused_as_by_predict(run: Path, file: Path, tmp_path: Path) -> None:
    spoilt = tmp_path / "spoilt.onnx"
    model = onnx.load(file)
    model.graph.node[0].domain = "evil"
    spoilt.write_bytes(model.SerializeToString())
    pickled = tmp_path / "model.pt2"
    shutil.copy(file, pickled)
    for path, reason in ((spoilt, "library 'evil'"), (pickled, "can hold pickles")):
        for command in (["evaluate", str(run), str(path)], ["evaluate", str(path), "--set", ON_TEST]):
            assert main(command) == 2
        with pytest.raises(RecipeError, match=reason):
            compare_beside_teachers([run, path])
    assert main(["predict", str(pickled), "x.png"]) == 2


def test_a_report_has_the_table_of_exported_files(run: Path, file: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="reports need the extra report")
    page = tmp_path / "report.html"
    found = write_report([run, file], page, ["device=cpu"], points=20)
    assert (found.runs, found.files) == (1, 1)
    text = html.unescape(page.read_text())
    assert "Exported files" in text
    rows = list(csv.DictReader(io.StringIO(unquote(text[text.index("model,parent,") :].partition('"')[0]))))
    assert [row["model"] for row in rows[:2]] == [str(run), str(file)]
    assert rows[1]["parent"] == str(run)
    assert float(rows[1]["top1"]) == evaluate(run, ["device=cpu"]).measures.quality
    alone = write_report([file], page, [ON_TEST, "num_workers=0"], measure=0)
    assert (alone.runs, alone.files) == (0, 1)
    assert main(["report", str(file), "--out", str(page)]) == 2
