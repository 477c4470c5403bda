"""Trackers: metrics of runs for the tools of others, each step once."""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from logitcache.cli.app import main
from logitcache.errors import MissingExtraError, RecipeError
from logitcache.report.export_runs import export_runs
from logitcache.student.trackers.tensorboard import _Events
from logitcache.student.training import Watcher, train, train_together
from logitcache.student.training_recipes import TrainingRecipe
from tests.student.small import metrics, student, weights


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


def events_of(out: Path) -> dict[str, list[tuple[int, float]]]:
    return scalars(out / "tensorboard")


LIVE = [{"kind": "tensorboard"}]


def test_a_live_tracker_has_the_rows_that_log_writes_afterwards(cache: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra tensorboard")
    train(student(tmp_path / "live", cache, trackers=LIVE))
    live = events_of(tmp_path / "live")
    shutil.copytree(tmp_path / "live", tmp_path / "later", ignore=shutil.ignore_patterns("tensorboard"))
    export_runs([tmp_path / "later"], "tensorboard")
    assert live == events_of(tmp_path / "later")
    assert [step for step, _ in live["loss"]] == [row["step"] for row in metrics(tmp_path / "live")]
    export_runs([tmp_path / "live"], "tensorboard")
    assert events_of(tmp_path / "live") == live


def test_a_resumed_run_doubles_no_step_and_a_new_tracker_gets_earlier_epochs(cache: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra tensorboard")
    out, elsewhere = tmp_path / "run", tmp_path / "events"
    train(student(out, cache, epochs=1, trackers=LIVE))
    train(student(out, cache, epochs=2, trackers=[*LIVE, LIVE[0] | {"folder": str(elsewhere)}]), resume=True)
    train(student(out, cache, epochs=3), resume=True)
    steps = [row["step"] for row in metrics(out)]
    assert [step for step, _ in events_of(out)["loss"]] == steps[:2]
    assert scalars(elsewhere / "run") == events_of(out)


def test_epochs_are_written_as_they_end(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra tensorboard")
    seen: list[int] = []

    class Spy(Watcher):
        def ended_epoch(self, recipe: TrainingRecipe, row: dict[str, Any]) -> None:
            seen.append(len(events_of(tmp_path / "run")["loss"]))

    train_together([student(tmp_path / "run", cache, trackers=LIVE)], Spy())
    assert seen == [1, 2]


def test_a_tracker_that_fails_is_named_and_gets_what_it_lacks_later(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra tensorboard")
    write, calls = _Events.write, list[int]()

    def failing(self: _Events, step: int, values: Mapping[str, float]) -> None:
        calls.append(step)
        if len(calls) in fails:
            raise OSError(28, "No space left on device")
        write(self, step, values)

    monkeypatch.setattr(_Events, "write", failing)
    fails = {1, 2}
    train(student(tmp_path / "healed", cache, epochs=3, trackers=LIVE))
    found, rows = events_of(tmp_path / "healed")["loss"], metrics(tmp_path / "healed")
    assert [step for step, _ in found] == [row["step"] for row in rows]
    (warning,) = [
        record.message
        for record in caplog.records
        if record.levelname == "WARNING" and "averages" not in record.message
    ]
    assert "tensorboard fails after 0 of 1 epochs: OSError: [Errno 28] No space left" in warning
    caplog.clear()
    calls.clear()
    fails = set(range(2, 9))
    train(student(tmp_path / "run", cache, epochs=3, trackers=LIVE))
    first, last = [
        record.message
        for record in caplog.records
        if record.levelname == "WARNING" and "averages" not in record.message
    ]
    assert "fails after 1 of 2 epochs" in first
    assert last.endswith(f"tensorboard lacks 2 of 3 epochs. Fix: logitcache log {tmp_path / 'run'} --to tensorboard")
    monkeypatch.undo()
    assert main([*last.partition("Fix: logitcache ")[2].split(), "-q"]) == 0
    assert len(events_of(tmp_path / "run")["loss"]) == 3
    assert weights(tmp_path / "run") == weights(tmp_path / "healed")


def test_a_tracker_that_does_not_open_stops_the_run_before_its_first_step(cache: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra tensorboard")
    (tmp_path / "file").touch()
    wrong = [{"kind": "tensorboard", "folder": str(tmp_path / "file")}]
    with pytest.raises(RecipeError, match="trackers: tensorboard does not open: NotADirectoryError") as found:
        train(student(tmp_path / "run", cache, trackers=wrong))
    assert "leave it out and run `logitcache log" in str(found.value)
    assert not (tmp_path / "run/checkpoint.pt").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", None)
        with pytest.raises(MissingExtraError, match=r"logitcache\[wandb\]"):
            train(student(tmp_path / "run", cache, trackers=[{"kind": "wandb", "mode": "offline"}]))


def test_training_without_trackers_imports_none(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from tests.student.small import fill, network, student\n"
        "from pathlib import Path\n"
        "from logitcache.student.training import train\n"
        "out = Path(sys.argv[1])\n"
        "train(student(out / 'run', fill(out / 'c.zarr'), epochs=1))\n"
        "import logitcache.student.trackers\n"
        "assert not {'tensorboard', 'wandb', 'trackio', 'mlflow', 'torch.utils.tensorboard'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=Path(__file__).parents[2])
