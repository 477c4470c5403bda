"""Metrics in MLflow and Weights & Biases: each step once, whatever was exported before."""

import json
from pathlib import Path
from typing import Any

import pytest

from logitcache.report.export_runs import export_runs

pytestmark = pytest.mark.integration
ROWS = [{"epoch": e, "step": 7 * (e + 1), "loss": 1 / (e + 1), "val_top1": e / 10, "none": None} for e in range(4)]


def run_of(folder: Path, epochs: int) -> Path:
    """Write the files of a run of some epochs."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text("out: x\nepochs: 4\nlosses: [{kind: kl_divergence, temperature: 2.0}]\n")
    (folder / "environment.json").write_text("{}")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:epochs]))
    return folder


@pytest.mark.filterwarnings("ignore")
def test_mlflow_has_each_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # its server and its databases take more libraries
    mlflow = pytest.importorskip("mlflow", exc_type=ImportError)
    store = [f"tracking_uri={(tmp_path / 'store').as_uri()}", "experiment=tests"]
    run = tmp_path / "runs/a"
    for epochs in (2, 4, 4):
        export_runs([run_of(run, epochs)], "mlflow", store)
    client = mlflow.MlflowClient((tmp_path / "store").as_uri())
    (found,) = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    for name in ("loss", "val_top1"):
        history = client.get_metric_history(found.info.run_id, name)
        assert [(one.step, one.value) for one in history] == [(row["step"], row[name]) for row in ROWS]
    assert found.data.params["losses.0.temperature"] == "2.0"
    assert (found.info.run_name, found.info.status) == ("a", "FINISHED")


@pytest.mark.filterwarnings("ignore")
def test_wandb_writes_each_step_once_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", exc_type=ImportError)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path))
    run = tmp_path / "runs/a"
    for epochs in (2, 4, 4):
        export_runs([run_of(run, epochs)], "wandb", ["mode=offline"])
    sessions = sorted((run / "wandb").glob("offline-run-*"))
    ids = {folder.name.split("-")[3] for folder in sessions}  # two of one second end with a number
    assert ids == {json.loads((run / "tracking.json").read_text())["id"]}
    rows = [row for folder in sessions for row in history_of(folder)]
    assert [row["_step"] for row in rows] == [row["step"] for row in ROWS]
    assert [row["loss"] for row in rows] == [row["loss"] for row in ROWS]


@pytest.mark.filterwarnings("ignore")
def test_trackio_has_each_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    trackio = pytest.importorskip("trackio", exc_type=ImportError)
    run = tmp_path / "runs/a"
    for epochs in (2, 4, 4):
        export_runs([run_of(run, epochs)], "trackio", ["project=tests"])
    (name,) = [one.name for one in trackio.Api().runs("tests")]
    logged = trackio.SQLiteStorage.get_logs("tests", name)
    assert [(one["step"], one["loss"]) for one in logged] == [(row["step"], row["loss"]) for row in ROWS]


def history_of(folder: Path) -> list[dict[str, Any]]:
    """Read the history of an offline session: records of protobuf in blocks of 32 KiB, as LevelDB's logs."""
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.glob("*.wandb")
    data, at, found, parts = file.read_bytes(), 7, [], b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record.FromString(parts)
            parts = b""
            if record.HasField("history"):
                items = record.history.item
                found.append({(item.key or item.nested_key[0]): json.loads(item.value_json) for item in items})
    return found
