"""The commands on real data, with what a user can do wrong: exit codes, messages, and what is left on the disk."""

import json
import os
import signal
from pathlib import Path

import pytest

from logitcache.cli import main
from tests.cli.waiting import AFTER, UNTIL
from tests.stage_one.apart import until
from tests.warm import Program

PRECOMPUTE = """
cache: {tmp}/c.zarr
dataset: {{kind: bundled, num_images: 200}}
views:
  num_views: 2
  augmentations: [{{kind: random_crop, size: 28, padding: 2}}, {{kind: horizontal_flip}}]
teachers:
  teacher: {{model: {{kind: bundled}}, logits: {{kind: dense, dtype: float32}}}}
num_workers: 0
"""
WAITING = "{model: {kind: custom, factory: 'tests.cli.waiting:Waiting'}, preprocessing: {mean: [0.5], std: [0.5]}"
STUDENT = """
out: {tmp}/run
cache: {tmp}/c.zarr
model: {{kind: small_cnn, width: 4}}
epochs: 2
batch_size: 50
num_workers: 0
validation: {{dataset: {{kind: bundled, split: test, num_images: 100}}}}
"""


@pytest.fixture
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Write the two recipes and return their paths; the working directory is an empty one."""
    monkeypatch.chdir(tmp_path)
    paths = {}
    for name, text in (("precompute", PRECOMPUTE), ("student", STUDENT)):
        file = tmp_path / f"{name}.yaml"
        file.write_text(text.format(tmp=tmp_path))
        paths[name] = str(file)
    return paths


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict, str]:
    """Run a command under --json: its exit code, its document, its messages."""
    code = main([*arguments, "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out), err


def test_the_main_job(recipes: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, made, _ = run(capsys, "precompute", recipes["precompute"])
    assert (code, made["shards_written"], made["teacher_passes"]) == (0, 2, 400 + 2 * 32)
    code, again, _ = run(capsys, "precompute", recipes["precompute"])
    assert (code, again["shards_written"]) == (0, 0)
    code, verified, _ = run(capsys, "verify", str(tmp_path / "c.zarr"))
    assert (code, verified["problems"], verified["images"]) == (0, [], "the same")
    code, shown, _ = run(capsys, "inspect", str(tmp_path / "c.zarr"))
    assert (code, shown["complete"]) == (0, True)
    assert shown["teachers"]["teacher"]["top1"] > 0.8
    code, trained, _ = run(capsys, "train-student", recipes["student"])
    assert (code, trained["steps"], trained["teacher_passes"]) == (0, 8, 0)
    code, measured, _ = run(capsys, "evaluate", str(tmp_path / "run"))
    assert code == 0
    assert measured["measures"]["top1"] == pytest.approx(trained["top1"])
    code, online, _ = run(
        capsys, "train-student", recipes["student"], "--online", "--set", f"out={tmp_path / 'online'}"
    )
    assert (code, online["teacher_passes"]) == (0, 400)
    assert online["loss"] == pytest.approx(trained["loss"], abs=1e-6)


@pytest.mark.parametrize(
    ("command", "overrides", "code", "words"),
    [
        ("precompute", ["views.seed=1"], 4, ["views.seed", "0", "1", "Fix"]),
        ("precompute", ["views.augmentations.1.p=0.2"], 4, ["augmentations", "Fix"]),
        ("precompute", ["dataset.num_images=100"], 4, ["200", "100", "Fix"]),
        ("precompute", ["teachers.teacher.preprocessing={mean: [0.5], std: [0.5]}"], 4, ["preprocessing", "Fix"]),
        ("precompute", ["cache=new.zarr", "teachers.teacher.logits={kind: top_k, k: 11}"], 2, ["11", "10", "Fix"]),
        ("precompute", ["device=cuda:7"], 2, ["cuda:7", "Fix"]),
        ("train-student", ["dataset={kind: bundled, num_images: 100}"], 4, ["200", "100", "Fix"]),
        ("train-student", ["cache=nowhere.zarr"], 3, ["nowhere.zarr", "does not exist", "Fix"]),
        ("train-student", ["losses=[{kind: kl_divergence, teacher: other}]"], 2, ["other", "teacher", "Fix"]),
        ("train-student", ["epochs=0"], 2, ["epochs"]),
    ],
)
def test_refusals_name_both_values_and_the_fix(
    recipes: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    command: str,
    overrides: list[str],
    code: int,
    words: list[str],
) -> None:
    assert run(capsys, "precompute", recipes["precompute"])[0] == 0
    recipe = recipes["precompute" if command == "precompute" else "student"]
    options = [word for override in overrides for word in ("--set", override)]
    found, document, _ = run(capsys, command, recipe, *options)
    assert found == code
    assert all(word in document["error"]["message"] for word in words), document["error"]["message"]


def test_a_flipped_byte_is_refused_named_and_mended(
    recipes: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "precompute", recipes["precompute"])
    shard = tmp_path / "c.zarr" / "teacher.logits" / "c.1.0.0"
    good = shard.read_bytes()
    shard.write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
    code, document, _ = run(capsys, "train-student", recipes["student"])
    assert code == 3
    assert "teacher.logits view 1 rows 0..200" in document["error"]["message"]
    code, document, _ = run(capsys, "verify", str(tmp_path / "c.zarr"))
    assert code == 3
    assert "teacher.logits view 1 rows 0..200" in document["problems"][0]
    code, document, _ = run(capsys, "precompute", recipes["precompute"])
    assert (code, document["shards_written"]) == (0, 1)
    assert shard.read_bytes() == good


def test_five_mistakes_are_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(
        "cache: c.zarr\n"
        "dataset: {kind: image_foldr, root: x}\n"
        "views: {num_view: 2, seed: -1}\n"
        "teachers:\n"
        "  t: {model: {kind: torchvision, name: resnet18, weights: null}, precision: float8}\n"
        "batchsize: 4\n"
    )
    assert main(["recipe", "check", str(file)]) == 2
    message = capsys.readouterr().err
    for place, suggestion in (
        (":2:", "image_folder"),
        (":3:", "num_views"),
        (":3:", "views.seed"),
        (":5:", "precision"),
        (":6:", "batch_size"),
    ):
        assert any(place in line and suggestion in line for line in message.splitlines()), (place, suggestion, message)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_stops_precompute_which_the_printed_line_continues(
    recipes: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], signum: int, code: int
) -> None:
    file = Path(recipes["precompute"])
    file.write_text(file.read_text().replace("{model: {kind: bundled}", WAITING))
    options = ["--set", "views.num_views=40", "--set", "num_workers=1"]
    record, sent = tmp_path / "c.zarr" / "teacher.logits.commits" / "c.0.0.0.0", tmp_path / "sent"
    environment = os.environ | {AFTER: str(record), UNTIL: str(sent)}
    with Program("logitcache", "precompute", recipes["precompute"], *options, environment=environment) as process:
        until(lambda: record.exists() or process.poll() is not None)
        process.signal(signum)  # the workers get it too
        sent.touch()
        ended, message = process.wait(120), process.errors
    assert ended == code, message
    assert f"Resume: logitcache precompute {recipes['precompute']} --set views.num_views=40" in message
    committed = len(list((tmp_path / "c.zarr" / "teacher.logits.commits").glob("c.*")))
    assert 0 < committed < 40
    document = run(capsys, "precompute", recipes["precompute"], "--set", "views.num_views=40")[1]
    assert document["shards_written"] == 40 - committed
