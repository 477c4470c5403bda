"""How far cached logits are from the teacher's: recorded by temperature, and told before a student learns from them."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from torch import Tensor, nn

from logitcache.cache.cache import open_cache
from logitcache.cli import main
from logitcache.config.recipe import dump_recipe
from logitcache.errors import TargetErrorWarning
from logitcache.report.recipe_check import check_recipes
from logitcache.student.training_data import open_training_data
from logitcache.views.keys import ViewKey
from tests.student.small import NUM_IMAGES, fill, network, student

KEYS = [ViewKey(view, index) for view in range(2) for index in range(NUM_IMAGES)]


class Offset(nn.Module):
    """A network with something in common to all of its logits, which no softmax shows."""

    def __init__(self, offset: float) -> None:
        super().__init__()
        self.network, self.offset = network(), offset

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.network(pixels) + self.offset
        return logits


def doubts(tmp_path: Path, cache: Path, temperature: Any) -> tuple[str, ...]:
    """What `recipe check` says, which training says too."""
    losses = [{"kind": "kl_divergence", "temperature": temperature}]
    entry = student(tmp_path / "run", cache, losses=losses)
    (tmp_path / "student.yaml").write_text(dump_recipe(entry))
    (checked,) = check_recipes([tmp_path / "student.yaml"])
    assert checked.error is None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", TargetErrorWarning)
        open_training_data(entry).stream([entry])
    assert [str(one.message) for one in caught] == list(checked.warnings)
    return checked.warnings


def fixes(message: str) -> list[dict[str, Any]]:
    return [yaml.safe_load(entry) for entry in re.findall(r"\{kind: [^}]*\}", message.split("Fix: ")[1])]


def strictly_filled(path: Path, net: nn.Module, logits: dict[str, Any]) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("error", TargetErrorWarning)
        return fill(path, {"net": net}, logits)


def log_softmax(z: np.ndarray) -> np.ndarray:
    return z - np.log(np.exp(z).sum(1, keepdims=True))


def test_an_offset_that_float16_rounds_is_recorded_and_told_and_each_fix_mends_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = Offset(1000.0)
    with pytest.warns(TargetErrorWarning, match="common offset") as caught:
        cache = fill(tmp_path / "half", {"net": net}, {"kind": "dense"})
    fix = fixes(str(caught[0].message))
    assert [entry["kind"] for entry in fix] == ["dense", "uint8", "transform"]
    better = [strictly_filled(tmp_path / str(number), net, entry) for number, entry in enumerate(fix)]
    exact = np.asarray(open_cache(better[0]).rows(KEYS)["net"].logits, np.float64)
    rounded = exact.astype(np.float16).astype(np.float64)
    recorded = open_cache(cache).manifest.teachers["net"].errors_of("logits")
    for errors, temperature in zip(recorded, (1.0, 4.0), strict=True):
        log_p, log_q = (log_softmax((z - 1000) / temperature) for z in (exact, rounded))
        rows = (np.exp(log_p) * (log_p - log_q)).sum(1)
        assert errors.temperature == temperature
        assert errors.mean == pytest.approx(rows.mean(), rel=1e-2)
        assert errors.max == pytest.approx(rows.max(), rel=1e-2)
    for temperature in (1.0, 2.0, 4.0):
        (doubt,) = doubts(tmp_path, cache, temperature)
        assert "losses.0 (kl_divergence): the dense logits of 'net' differ" in doubt
        assert [doubts(tmp_path, path, temperature) for path in better] == [(), (), ()]
    assert main(["recipe", "check", str(tmp_path / "student.yaml")]) == 0
    assert "OK" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("logits", "temperature", "what"),
    [
        ({"kind": "top_k", "k": 2}, 2.0, "the bound is 0.001"),
        ({"kind": "top_k", "k": 2}, 8.0, "no errors are recorded at T = 8, only from 1 to 4"),
        ({"kind": "packed_top_k", "k": 2}, 0.5, "no errors are recorded at T = 0.5, only from 1 to 4"),
        (
            {"kind": "top_k", "k": 2},
            {"kind": "linear", "start": 8, "stop": 1, "epochs": 2},
            "no errors are recorded at T = 1 to 8, only from 1 to 4",
        ),
    ],
)
def test_temperatures_beyond_bound_or_record_are_told_by_check_and_training_and_each_fix_mends_it(
    tmp_path: Path, logits: dict[str, Any], temperature: Any, what: str
) -> None:
    net = network()
    (doubt,) = doubts(tmp_path, fill(tmp_path / "c", {"net": net}, logits), temperature)
    assert what in doubt
    for number, entry in enumerate(fixes(doubt)):
        assert doubts(tmp_path, strictly_filled(tmp_path / str(number), net, entry), temperature) == ()


def test_rounding_alone_is_not_worth_a_word_and_inspect_shows_it_by_temperature(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = strictly_filled(tmp_path / "c", network(), {"kind": "dense"})
    assert [doubts(tmp_path, cache, temperature) for temperature in (0.5, 1.0, 4.0, 20.0)] == [()] * 4
    assert main(["inspect", str(cache), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["teachers"]["net"]
    assert [(row["target"], row["temperature"]) for row in shown["errors"]] == [("logits", 1.0), ("logits", 4.0)]
    assert all(0 < row["mean"] <= row["p999"] <= row["max"] < 1e-4 for row in shown["errors"])
    assert shown["targets"][0]["errors"] == "recorded"
    assert shown["measured_on"] == (
        f"{NUM_IMAGES} labelled rows of view 0, as augmented by random_crop, horizontal_flip"
    )
    assert main(["inspect", str(cache)]) == 0
    text = capsys.readouterr().out
    assert "teachers.net.errors:" in text
    assert re.search(r"logits +4 +[0-9.e-]+ ", text)


def test_what_is_kept_exactly_has_no_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = strictly_filled(tmp_path / "c", Offset(1000.0), {"kind": "dense", "dtype": "float32"})
    assert doubts(tmp_path, cache, 20.0) == ()
    assert main(["inspect", str(cache), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["teachers"]["net"]
    assert (shown["errors"], shown["targets"][0]["errors"]) == ([], "none")
