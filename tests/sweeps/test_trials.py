"""Trials: the points of a space, drawn at random or by a study that goes on after a kill as if there had been none."""

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from logitcache.config.recipe import load_recipe
from logitcache.errors import CacheError, MismatchError, RecipeError
from logitcache.sweeps.objectives import fronts
from logitcache.sweeps.search.search_recipe import Optuna, Random
from logitcache.sweeps.search.study import StudyTrials
from logitcache.sweeps.search.trials import RandomTrials, Trial, TrialResult, axes_of, corners_of, parse_search

LR = {"kind": "log_uniform", "low": 1e-4, "high": 1.0}
SPACE: dict[str, Any] = {"optimizer.lr": LR, "model.width": {"kind": "integer", "low": 2, "high": 9, "step": 3}}
SPACE |= {"losses.0.weight": {"kind": "uniform", "low": -1, "high": 3}, "losses": {"a": [1], "b": [2], "c": [3]}}


def drawn(count: int, space: dict[str, Any] = SPACE, **entries: Any) -> list[Trial]:
    search = load_recipe({"kind": "random", "space": space, "trials": count} | entries, Random)
    return RandomTrials(search, axes_of(search.space)).batch(range(count))


def values(trials: list[Trial], key: str) -> list[Any]:
    return [trial.cell.changes[key] for trial in trials]


def test_random_trials_are_spread_as_their_ranges_say() -> None:
    trials = drawn(2000)
    rates = [math.log10(value) for value in values(trials, "optimizer.lr")]
    assert -4 <= min(rates) < -3.9 < -0.1 < max(rates) <= 0
    assert statistics.fmean(rates) == pytest.approx(-2, abs=0.1)
    weights = values(trials, "losses.0.weight")
    assert -1 <= min(weights) < -0.9 < 2.9 < max(weights) <= 3
    assert statistics.pstdev(weights) == pytest.approx(4 / math.sqrt(12), rel=0.05)
    widths = values(trials, "model.width")
    assert {width: round(widths.count(width) / 2000, 1) for width in widths} == {2: 0.3, 5: 0.3, 8: 0.3}
    chosen = [entry[0] for entry in values(trials, "losses")]
    assert {one: round(chosen.count(one) / 2000, 1) for one in chosen} == {1: 0.3, 2: 0.3, 3: 0.3}


def test_a_random_trial_depends_on_seed_number_and_key_alone() -> None:
    few, many = drawn(3), drawn(9)
    assert few == many[:3]
    other_keys = drawn(3, {"epochs": [1, 2], "optimizer.lr": LR})
    assert values(other_keys, "optimizer.lr") == values(few, "optimizer.lr")
    assert values(drawn(3, seed=1), "optimizer.lr") != values(few, "optimizer.lr")
    assert len(set(values(many, "optimizer.lr"))) == 9


def test_a_trial_is_named_by_its_number_and_its_point() -> None:
    space = {"optimizer.lr": LR, "model": {"small/cnn": {"kind": "small_cnn"}}, "losses.0.weight, ema": [[1, 0.5]]}
    (trial,) = drawn(1, space)
    rate = trial.cell.changes["optimizer.lr"]
    assert trial.cell.name == f"trial=0,lr={rate:g},model=small_cnn,weight=1+0.5"
    assert trial.cell.changes == {
        "optimizer.lr": rate,
        "model": {"kind": "small_cnn"},
        "losses.0.weight": 1,
        "ema": 0.5,
    }


def test_the_corners_of_a_space_have_every_choice_and_both_ends() -> None:
    search = load_recipe({"kind": "random", "space": SPACE, "trials": 1}, Random)
    corners = [dict(cell.changes) for cell in corners_of(axes_of(search.space))]
    assert len(corners) == 2 + 2 + 2 + 3
    assert {corner["model.width"] for corner in corners} == {2, 8}
    assert {corner["optimizer.lr"] for corner in corners} == {1e-4, 1.0}
    assert [corner["losses"] for corner in corners[-3:]] == [[1], [2], [3]]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"space": {}}, "space"),
        ({"space": {"a": []}}, "space.a"),
        ({"space": {"a": {"kind": "uniform", "low": 2, "high": 1}}}, "space.a is neither choices nor a range"),
        ({"space": {"a": {"kind": "normal", "low": 2}}}, "space.a is neither choices nor a range"),
        ({"space": {"a,b": {"kind": "uniform", "low": 1, "high": 2}}}, "a range is of one key"),
        ({"objectives": []}, "objectives"),
        ({"objectives": ["accuracy", "accuracy"]}, "one of them twice"),
        ({"objectives": ["speed"]}, "objectives.*accuracy"),
        ({"trials": 0}, "trials"),
    ],
)
@pytest.mark.parametrize("kind", [Random, Optuna])
def test_a_search_that_cannot_be_is_refused(kind: Any, entries: dict[str, Any], message: str) -> None:
    name = kind.model_fields["kind"].default
    with pytest.raises(RecipeError, match=message):
        load_recipe({"kind": name, "space": {"a": [1]}, "trials": 1} | entries, kind)


def test_options_of_the_command_line_are_entries_of_a_search() -> None:
    space = ["optimizer.lr={kind: log_uniform, low: 1e-3, high: 0.1}", "model.width=2,4", "model={kind: small_cnn}"]
    assert parse_search("{kind: optuna, batch: 4}", space, 12) == {
        "kind": "optuna",
        "batch": 4,
        "space": {
            "optimizer.lr": {"kind": "log_uniform", "low": 1e-3, "high": 0.1},
            "model.width": [2, 4],
            "model": [{"kind": "small_cnn"}],
        },
        "trials": 12,
    }
    assert parse_search("random", (), None) == {"kind": "random"}
    assert parse_search(None, (), None) == {}
    for search, keys in (("[1]", []), ("{a", []), (None, ["a"])):
        with pytest.raises(RecipeError, match=r"--s.*: write"):
            parse_search(search, keys, None)


def opened(path: Path, objectives: list[str], **entries: Any) -> StudyTrials:
    pytest.importorskip("optuna")
    space = {"x": {"kind": "uniform", "low": 0, "high": 1}, "y": {"kind": "uniform", "low": 0, "high": 1}, "z": [1, 2]}
    entries = {"kind": "optuna", "space": space, "trials": 12, "batch": 4, "objectives": objectives} | entries
    search = load_recipe(entries, Optuna)
    return StudyTrials(search, axes_of(search.space), 4, path)


def of_one(x: float, y: float) -> list[float]:
    return [-((x - 0.3) ** 2) - (y - 0.7) ** 2]


def of_two(x: float, y: float) -> list[float]:
    """ZDT1 of two variables: its front is y = 0."""
    return [-x, (1 + 9 * y) * (1 - math.sqrt(x / (1 + 9 * y)))]


Function = Callable[[float, float], list[float]]
STUDIES: dict[str, tuple[list[str], Function]] = {
    "one": (["accuracy"], of_one),
    "several": (["accuracy", "latency"], of_two),
}


def search_on(path: Path, name: str, count: int = 12, fails: tuple[int, ...] = (5,)) -> list[tuple[int, str, Any]]:
    """Run a study to its end, wherever it is; return its trials as another reader of the journal sees them."""
    import optuna

    objectives, function = STUDIES[name]
    for start in range(0, count, 4):
        study = opened(path, objectives, trials=count)
        for trial in study.batch(range(start, start + 4)):
            x, y = (trial.cell.changes[key] for key in "xy")
            state, epochs = (
                ("failed", 0) if trial.number in fails else ("stopped", 1) if trial.number == 2 else ("finished", 3)
            )
            found = {} if state == "failed" else dict(zip(objectives, function(x, y), strict=True))  # type: ignore[arg-type]
            study.tell(TrialResult(trial.number, "", state, epochs, {}, found))  # type: ignore[arg-type]
            assert study.is_told(trial)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
    (read,) = optuna.get_all_study_summaries(storage)
    trials = optuna.load_study(study_name=read.study_name, storage=storage).trials
    whole = [trial for trial in trials if len(trial.params) == 3]
    return [(trial.state.name, trial.params, trial.values) for trial in whole]


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_that_was_killed_after_any_write_goes_on_as_if_it_had_not_been(name: str, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    path = tmp_path / "study.jsonl"
    whole = search_on(path, name)
    assert [state for state, *_ in whole].count("COMPLETE") == 10
    assert (whole[2][0], whole[5][0]) == ("PRUNED", "FAIL")
    lines = path.read_bytes().splitlines(keepends=True)
    for count in range(0, len(lines), 3):
        path.write_bytes(b"".join(lines[:count]) + lines[count][: count % 7])  # the last one cut, too
        (tmp_path / "study.jsonl.lock").symlink_to(path)
        assert search_on(path, name) == whole, f"killed after {count} writes"


@pytest.mark.parametrize("name", STUDIES)
def test_results_are_told_once(name: str, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    whole = search_on(tmp_path / "study.jsonl", name)
    before = (tmp_path / "study.jsonl").read_bytes()
    assert search_on(tmp_path / "study.jsonl", name) == whole
    told = [
        line for line in (tmp_path / "study.jsonl").read_bytes()[len(before) :].splitlines() if b'"trial_id"' in line
    ]
    assert told == []


def test_tpe_and_nsga2_learn_from_what_they_are_told(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    count = 60
    found = search_on(tmp_path / "one", "one", count, fails=())
    early, late = (statistics.fmean(values[0] for *_, values in part) for part in (found[:10], found[-20:]))
    assert late > early / 2 > early, "distances from the best point shrink"
    found = search_on(tmp_path / "several", "several", count, fails=())
    early, late = (statistics.fmean(params["y"] for _, params, _ in part) for part in (found[:10], found[-20:]))
    assert late < early / 2, "the front is y = 0"
    scores = {str(n): (v[0], -v[1]) for n, (state, _, v) in enumerate(found) if state == "COMPLETE"}
    assert sum(int(number) >= 20 for number in next(fronts(scores))) > len(next(fronts(scores))) / 2


def test_a_study_of_another_search_is_refused_and_a_longer_one_goes_on(tmp_path: Path) -> None:
    opened(tmp_path / "s", ["accuracy"])
    with pytest.raises(MismatchError, match=r"(?s)objectives: the study has \[\"accuracy\"\].*Fix: change these back"):
        opened(tmp_path / "s", ["agreement"])
    with pytest.raises(MismatchError, match="seed: the study has 0, the recipe 3"):
        opened(tmp_path / "s", ["accuracy"], seed=3)
    opened(tmp_path / "s", ["accuracy"], trials=100, finalists={"seeds": 2})


@pytest.mark.parametrize("damage", [b"{}\n", b"not JSON\n", b'{"op_code":0}\n{"op_code": 5}\n', b"[1]\n"])
def test_a_damaged_journal_is_named_with_its_fix(damage: bytes, tmp_path: Path) -> None:
    path = tmp_path / "study.jsonl"
    opened(path, ["accuracy"]).batch(range(4))
    path.write_bytes(path.read_bytes() + damage + b"{}\n")
    with pytest.raises(CacheError, match=r"study.jsonl is damaged: .*Fix: put back a copy"):
        opened(path, ["accuracy"])
