"""Trackers: metrics of runs for the tools of others, each step once."""

import json
import shutil
from pathlib import Path

import pytest

from logitcache.cli.app import main
from logitcache.report.export_runs import export_runs
from logitcache.student.training import train
from tests.student.small import metrics, student


@pytest.fixture(scope="module")
def run(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tracked") / "run"
    train(student(out, cache, epochs=3))
    return out


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read all event files of a folder, by the records themselves."""
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    found: dict[str, list[tuple[int, float]]] = {}
    for file in sorted(folder.iterdir()):
        for event in loader.EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.tensor.float_val[0]))
    return found


def rewound(run: Path, out: Path, epochs: int) -> Path:
    """Copy a run as it was after some epochs."""
    shutil.copytree(run, out)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:epochs]))
    return out


def test_events_are_the_rows_of_the_run_and_an_export_again_adds_what_is_new(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra tensorboard")
    begun = rewound(run, tmp_path / "run", 2)
    export_runs([begun], "tensorboard")
    shutil.copy(run / "metrics.jsonl", begun)
    for _ in range(2):
        export_runs([begun], "tensorboard")
    found, rows = scalars(begun / "tensorboard"), metrics(run)
    for name in ("loss", "loss_0_kl_divergence", "lr", "temperature_0_kl_divergence"):
        assert [step for step, _ in found[name]] == [row["step"] for row in rows]
        assert [value for _, value in found[name]] == pytest.approx([row[name] for row in rows], rel=1e-6)
    assert set(found) == {name for row in rows for name in row if name not in ("epoch", "step")} | {
        "seconds",
        "images_per_second",
    }


def test_a_stop_between_two_metrics_of_a_step_doubles_none(run: Path, tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard", reason="needs the extra tensorboard")
    begun = rewound(run, tmp_path / "run", 3)
    with tensorboard.SummaryWriter(str(begun / "tensorboard")) as writer:
        row = metrics(run)[0]
        writer.add_scalar("loss", row["loss"], row["step"])
    export_runs([begun], "tensorboard")
    found = scalars(begun / "tensorboard")
    assert all(len(points) == 3 for points in found.values())


def test_the_command_takes_folders_of_runs_and_keys_of_the_tracker(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra tensorboard")
    for name in ("a", "b"):
        rewound(run, tmp_path / "runs" / name, 3)
    words = ["--to", "tensorboard", "--set", f"folder={tmp_path / 'events'}", "--json"]
    assert main(["log", str(tmp_path / "runs"), *words]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [row["epochs"] for row in document["runs"]] == [3, 3]
    assert all(len(scalars(tmp_path / "events" / name)["loss"]) == 3 for name in ("a", "b"))


def test_folders_without_runs_and_unknown_keys_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["log", str(tmp_path), "--to", "tensorboard"]) == 2
    assert "Fix: name the `out:` of a training" in capsys.readouterr().err
    assert main(["log", str(run), "--to", "tensorboard", "--set", "project=x"]) == 2
    assert "project" in capsys.readouterr().err
    assert main(["log", str(run), "--to", "other"]) == 2


def test_training_imports_no_tracker(cache: Path, tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys, logitcache.student.training, logitcache.student.trackers\n"
        "assert not {'tensorboard', 'wandb', 'mlflow', 'torch.utils.tensorboard'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
