"""The command, and what `--online` makes of a derived cache."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from logitcache.cache.snapshot import open_snapshot
from logitcache.cache.write.writer_locks import Claim, writing
from logitcache.cli import main
from logitcache.config.recipe import dump_recipe
from logitcache.errors import MismatchError
from logitcache.models import SmallCNN
from logitcache.report.recipe_check import check_recipes
from logitcache.runtime.console import configure
from logitcache.runtime.stopping import StopFlag
from logitcache.stage_one.derive import derive as module
from logitcache.stage_one.derive.derive import derive
from logitcache.stage_one.precompute import precompute
from logitcache.store.local import LocalStore
from logitcache.teacher.online import live_targets
from tests.cache.made import DENSE32, recipe, teacher
from tests.stage_one.derived import CLASSES, derivation, source

PACKED = {"kind": "dense", "storage": "packed"}
A = {"a": {"logits": {"kind": "transform", "step": 0.2, "corrections": 4}}}
MEAN = {"members": {"a": 1, "b": 1}, "average": "probabilities", "logits": PACKED}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source(tmp_path_factory.mktemp("source") / "c.zarr")


def test_online_rebuilds_the_network_of_a_re_encoding_and_refuses_that_of_a_mean(tmp_path: Path) -> None:
    torch.save(SmallCNN(width=4).build(CLASSES, 3).module.state_dict(), tmp_path / "weights.pt")
    network = {"kind": "small_cnn", "width": 4}
    model = {"kind": "checkpoint", "path": str(tmp_path / "weights.pt"), "model": network, "num_classes": CLASSES}
    entries = {"a": teacher(DENSE32, model=model), "b": teacher(DENSE32, model=model)}
    images = {"kind": "custom", "factory": "tests.cache.made:Pixels", "arguments": {"count": 40}}
    precompute(recipe(tmp_path / "c", teachers=entries, dataset=images, shard_rows=128))
    derive(derivation(tmp_path / "c", tmp_path / "one", {"other": {"members": {"a": 1}, "logits": PACKED}}))
    pixels, labels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.full((2,), -1)
    live = live_targets(str(tmp_path / "one"), "cpu")(pixels, labels)["other"]
    assert torch.equal(live.logits, live_targets(str(tmp_path / "c"), "cpu")(pixels, labels)["a"].logits)  # type: ignore[arg-type]
    derive(derivation(tmp_path / "c", tmp_path / "mean", {"m": MEAN}))
    with pytest.raises(MismatchError, match=r"'m' is the mean of a, b, made by `logitcache derive`.*Fix: "):
        live_targets(str(tmp_path / "mean"), "cpu")


def test_derive_waits_for_shards_that_are_held(two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, store = derivation(two, tmp_path / "d", A), LocalStore(tmp_path / "d")
    count = derive(plan, part="1/2").shards_left
    assert count > 0
    with writing(store):
        held = [Claim(store, shard) for shard in open_snapshot(tmp_path / "d").layout.shards()]
        assert all(claim.take() for claim in held)
        left = derive(plan)
        assert (left.shards_written, left.shards_left, left.shards_held) == (0, count, count)

        def release(flag: StopFlag, seconds: float) -> bool:
            for claim in held if seconds else ():
                claim.release()
            return False

        monkeypatch.setattr(StopFlag, "wait", release)
        found = derive(plan, wait=True)
    assert (found.shards_written, found.shards_left) == (count, 0)


def test_the_command_tells_what_it_did_and_how_it_failed(
    two: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(dump_recipe(derivation(two, tmp_path / "d", A)))
    try:
        (checked,) = check_recipes([file])
        assert (checked.command, checked.error) == ("derive", None)
        assert main(["derive", str(file), "--json", "--part", "1/2"]) == 0
        first = json.loads(capsys.readouterr().out)
        assert main(["derive", str(file), "--json"]) == 0
        both = json.loads(capsys.readouterr().out)
        assert (first["shards_left"], both["shards_left"]) == (both["shards_written"], 0)
        assert both["cache"] == str(tmp_path / "d")
        assert main(["derive", str(file), "--set", "teachers.a.logits.step=0.7"]) == 4
        assert main(["derive", str(file), "--set", "cache=nowhere"]) == 3
        assert main(["derive", str(file), "--set", "average=1"]) == 2
        seen = []

        def run(plan: Any, **given: Any) -> Any:
            seen.append(given)
            return derive(plan)

        monkeypatch.setattr(module, "derive", run)
        assert main(["derive", str(file), "--workers", "2"]) == 0
        assert main(["derive", str(file), "--scheduler", "tcp://a:1", "--part", "1/3"]) == 0
        assert seen == [
            {"scheduler": None, "workers": 2, "part": None, "wait": False},
            {"scheduler": "tcp://a:1", "workers": None, "part": "1/3", "wait": False},
        ]
    finally:
        configure(quiet=True)
    assert "shards_left" in asdict(derive(derivation(two, tmp_path / "d", A)))
