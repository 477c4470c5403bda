"""Several teachers as one: its probabilities are the mean that the recipe asks for, cached and live alike."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import TypeAdapter
from safetensors.torch import load_file
from torch import Tensor

from logitcache.cache.encodings.top_k import TopK
from logitcache.config.recipe import load_recipe
from logitcache.errors import LogitCacheError, MismatchError, RecipeError
from logitcache.logits import NO_LOGITS, EnsembleLogits, LinearLogits, Logits, dense_logits, log_probs, top1
from logitcache.student.ensembles import Ensemble, num_classes_of, with_ensembles
from logitcache.student.training import train
from logitcache.student.training_recipes import StudentRecipe
from logitcache.targets import Batch, MixedLabels, Targets
from logitcache.teacher.online import live_targets
from tests.student.small import UNLABELLED, fill, network, recorded_losses, student

ROWS, CLASSES = 8, 6
LABELS = torch.tensor([0, 3, -1, 5, 5, -1, 1, 2])
PARTNERS = torch.tensor([1, -1, 2, 5, 0, 3, -1, 2])
SHARE = torch.linspace(0, 1, ROWS)
Array = NDArray[np.float64]


def _logits(seed: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(seed))


def _encoded(logits: Tensor) -> Logits:
    encoding = TopK(k=3)
    return encoding.decode(encoding.encode(logits), CLASSES)


MEMBERS: dict[str, Logits] = {
    "a": _logits(0),
    "b": _encoded(_logits(1)),
    "c": LinearLogits(_logits(2), _logits(3), SHARE),
    "d": _logits(4, 30.0),
}


def _batch(mixed: bool = False) -> Batch:
    teachers = {name: Targets(logits) for name, logits in MEMBERS.items()}
    images = torch.zeros(ROWS, 1, 1, 1, dtype=torch.uint8)
    labels = MixedLabels(PARTNERS, SHARE) if mixed else None
    return Batch(images, LABELS, torch.zeros(ROWS, 2), teachers, labels)


def _ensemble(**entry: Any) -> Ensemble:
    found: Ensemble = TypeAdapter(Ensemble).validate_json(json.dumps(entry))
    return found


def _answer(ensemble: Ensemble, mixed: bool = False) -> EnsembleLogits:
    logits = with_ensembles(_batch(mixed), {"all": ensemble}).teachers["all"].compact
    assert isinstance(logits, EnsembleLogits)
    return logits


def _p(name: str, row: int, temperature: float = 1.0) -> Array:
    p: Array = log_probs(MEMBERS[name], temperature)[row].double().exp().numpy()
    return p


def _softmax(values: Array) -> Array:
    p: Array = np.exp(values - values.max())
    return p / p.sum()


def _alike(names: tuple[str, ...], row: int) -> Array:
    return np.full(len(names), 1 / len(names))


def _one_to_three(names: tuple[str, ...], row: int) -> Array:
    return np.array([0.25, 0.75])


def _confident(names: tuple[str, ...], row: int) -> Array:
    if LABELS[row] < 0:
        return _alike(names, row)
    losses = np.array([-np.log(_p(name, row)[LABELS[row]]) for name in names])
    return (1 - _softmax(losses)) / (len(names) - 1)


def _confident_of_both(names: tuple[str, ...], row: int) -> Array:
    if LABELS[row] < 0 or PARTNERS[row] < 0:
        return _alike(names, row)
    share = float(SHARE[row])
    p = [_p(name, row) for name in names]
    losses = [-share * np.log(q[LABELS[row]]) - (1 - share) * np.log(q[PARTNERS[row]]) for q in p]
    return (1 - _softmax(np.array(losses))) / (len(names) - 1)


def _sure(names: tuple[str, ...], row: int) -> Array:
    entropies = [-sum(q * np.log(q) for q in _p(name, row) if q > 0) for name in names]
    return _softmax(-np.array(entropies))


Weigh = Callable[[tuple[str, ...], int], Array]
CASES: dict[str, tuple[dict[str, Any], bool, Weigh]] = {
    "mean of all": ({"kind": "mean"}, False, _alike),
    "mean of two": ({"kind": "mean", "teachers": ["c", "a"]}, False, _alike),
    "weighted": ({"kind": "mean", "teachers": ["b", "a"], "weights": [2, 6]}, False, _one_to_three),
    "by_confidence": ({"kind": "by_confidence"}, False, _confident),
    "by_confidence of two": ({"kind": "by_confidence", "teachers": ["a", "b"]}, False, _confident),
    "by_confidence of mixed images": ({"kind": "by_confidence"}, True, _confident_of_both),
    "by_entropy": ({"kind": "by_entropy"}, False, _sure),
    "by_entropy of two": ({"kind": "by_entropy", "teachers": ["d", "c"]}, True, _sure),
}
every_case = pytest.mark.parametrize("name", CASES)


@every_case
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_an_ensemble_is_the_weighted_mean_of_its_members_probabilities(name: str, temperature: float) -> None:
    entry, mixed, weigh = CASES[name]
    ensemble = _ensemble(**entry)
    names = ensemble.teachers or tuple(MEMBERS)
    found = _answer(ensemble, mixed)
    p = found.log_probs(temperature).double().exp().numpy()
    for row in range(ROWS):
        weights = weigh(names, row)
        assert weights.sum() == pytest.approx(1)
        np.testing.assert_allclose(found.weights[row].numpy(), weights, rtol=1e-4, atol=1e-6)
        expected = sum(w * _p(member, row, temperature) for w, member in zip(weights, names, strict=True))
        np.testing.assert_allclose(p[row], expected, rtol=1e-4, atol=1e-7)


@every_case
def test_an_ensemble_is_cut_and_moved_as_its_members_are(name: str) -> None:
    entry, mixed, _ = CASES[name]
    whole = with_ensembles(_batch(mixed), {"all": _ensemble(**entry)})
    for rows in (slice(0, 1), slice(2, 5), slice(6, 99)):
        part = with_ensembles(_batch(mixed)[rows], {"all": _ensemble(**entry)})
        for cut in (whole[rows], whole.to("cpu")[rows], part):
            found, expected = cut.teachers["all"].compact, whole.teachers["all"].compact
            torch.testing.assert_close(log_probs(found, 2.0), log_probs(expected, 2.0)[rows], rtol=1e-5, atol=1e-6)
    assert whole.teachers.keys() == {*MEMBERS, "all"}


@settings(max_examples=25, deadline=None)
@given(values=st.lists(st.floats(0.0625, 64, width=32), min_size=ROWS, max_size=ROWS))
def test_a_temperature_for_each_row_is_that_of_the_row_alone(values: list[float]) -> None:
    logits = _answer(_ensemble(kind="by_entropy"))
    found = log_probs(logits, torch.tensor(values))
    for row, temperature in enumerate(values):
        alone = log_probs(logits[row : row + 1], temperature)
        torch.testing.assert_close(found[row : row + 1], alone, rtol=1e-5, atol=1e-6)


def test_an_ensemble_has_a_best_class_and_no_logits() -> None:
    logits = _answer(_ensemble(kind="mean", teachers=["a", "c"]))
    expected = torch.stack([log_probs(MEMBERS[name]).exp() for name in "ac"]).mean(dim=0).argmax(dim=1)
    assert torch.equal(top1(logits), expected)
    assert logits.num_classes == CLASSES
    with pytest.raises(RecipeError, match=f"only a distribution over {CLASSES} classes"):
        dense_logits(logits)


def test_a_member_that_is_sure_and_wrong_counts_for_nothing() -> None:
    right, wrong = (1e4 * torch.nn.functional.one_hot(labels, CLASSES) for labels in (LABELS % 6, (LABELS + 1) % 6))
    teachers = {"right": Targets(right.float()), "wrong": Targets(wrong.float())}
    batch = Batch(_batch().images, LABELS % 6, _batch().keys, teachers)
    logits = with_ensembles(batch, {"both": _ensemble(kind="by_confidence")}).teachers["both"].compact
    for temperature in (1.0, 8.0):
        torch.testing.assert_close(log_probs(logits, temperature), log_probs(right.float(), temperature))


@pytest.mark.parametrize("mixed", [False, True])
def test_a_member_that_holds_the_label_for_impossible_counts_for_nothing(mixed: bool) -> None:
    impossible = torch.full((ROWS, CLASSES), -torch.inf)
    impossible[:, 4] = 0.0
    teachers = {"a": Targets(MEMBERS["a"]), "one": Targets(impossible), "same": Targets(impossible)}
    labels = torch.zeros(ROWS, dtype=torch.int64)
    shares = MixedLabels(labels, SHARE) if mixed else None
    batch = Batch(_batch().images, labels, _batch().keys, teachers, shares)
    for names, expected in ((["a", "one"], [1.0, 0.0]), (["one", "same"], [0.5, 0.5])):
        logits = with_ensembles(batch, {"x": _ensemble(kind="by_confidence", teachers=names)}).teachers["x"].compact
        assert isinstance(logits, EnsembleLogits)
        assert torch.equal(logits.weights, torch.tensor([expected]).expand(ROWS, 2))
        assert log_probs(logits).exp().sum(dim=1).allclose(torch.ones(ROWS))


def test_a_teacher_of_features_alone_is_no_member() -> None:
    teachers = {"a": Targets(MEMBERS["a"]), "features": Targets(NO_LOGITS), "d": Targets(MEMBERS["d"])}
    batch = Batch(_batch().images, LABELS, _batch().keys, teachers)
    logits = with_ensembles(batch, {"both": _ensemble(kind="by_entropy")}).teachers["both"].compact
    expected = _answer(_ensemble(kind="by_entropy", teachers=["a", "d"]))
    assert torch.equal(log_probs(logits, 2.0), expected.log_probs(2.0))


def test_teachers_that_say_the_same_are_as_one() -> None:
    teachers = dict.fromkeys("ab", Targets(MEMBERS["a"]))
    batch = Batch(_batch().images, LABELS, _batch().keys, teachers)
    for kind in ("mean", "by_confidence", "by_entropy"):
        logits = with_ensembles(batch, {"both": _ensemble(kind=kind)}).teachers["both"].compact
        torch.testing.assert_close(log_probs(logits, 3.0), log_probs(MEMBERS["a"], 3.0))


TEACHERS = {"a": 10, "b": 10, "c": 7}


@pytest.mark.parametrize(
    ("name", "entry", "error", "match"),
    [
        ("a", {"kind": "mean", "teachers": ["a", "b"]}, RecipeError, r"ensembles.a: the cache has a teacher of that"),
        (
            "x",
            {"kind": "mean", "teachers": ["a", "d"]},
            RecipeError,
            r"made of \['d'\], the cache has \['a', 'b', 'c'\]",
        ),
        ("x", {"kind": "mean", "teachers": ["a", "a"]}, RecipeError, "at least two teachers, each once"),
        ("x", {"kind": "mean"}, MismatchError, r"different numbers of classes: {'a': 10, 'b': 10, 'c': 7}"),
        ("x", {"kind": "by_entropy", "teachers": ["a", "c"]}, MismatchError, "different numbers of classes"),
        ("x", {"kind": "by_confidence", "teachers": ["a", "b"]}, RecipeError, r"\(by_confidence\) needs labels"),
    ],
)
def test_what_cannot_be_an_ensemble_is_refused(
    name: str, entry: dict[str, Any], error: type[LogitCacheError], match: str
) -> None:
    with pytest.raises(error, match=match):
        num_classes_of({name: _ensemble(**entry)}, TEACHERS, labelled=False)


def test_one_teacher_is_no_ensemble() -> None:
    with pytest.raises(RecipeError, match=r"ensembles.x is made of \['a'\]. Fix: at least two teachers"):
        num_classes_of({"x": _ensemble(kind="mean")}, {"a": 10}, labelled=True)


def test_an_ensemble_has_the_classes_of_its_members() -> None:
    ensembles = {
        "x": _ensemble(kind="mean", teachers=["b", "a"]),
        "y": _ensemble(kind="by_entropy", teachers=["a", "b"]),
    }
    assert num_classes_of(ensembles, TEACHERS, labelled=False) == TEACHERS | {"x": 10, "y": 10}
    assert num_classes_of({}, TEACHERS, labelled=False) == TEACHERS


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ({"kind": "mean", "teachers": ["a"]}, r"ensembles.both.teachers"),
        ({"kind": "mean", "weights": [1, 2]}, r"weights are one for each of `teachers`, which must be named"),
        ({"kind": "mean", "teachers": ["a", "b"], "weights": [1]}, r"weights are one for each"),
        (
            {"kind": "mean", "teachers": ["a", "b"], "weights": [1, 0]},
            r"ensembles.both.weights.1' = 0: must be greater",
        ),
        ({"kind": "meen"}, r"did you mean 'mean'"),
    ],
)
def test_an_entry_that_makes_no_sense_is_refused(entry: dict[str, Any], match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        load_recipe(_recipe(ensembles={"both": entry}), StudentRecipe)


def _recipe(**changes: Any) -> dict[str, Any]:
    return {"out": "o", "cache": "c", "model": {"kind": "small_cnn"}, "epochs": 1} | changes


def test_the_stored_form_is_what_was_written() -> None:
    entry = {"kind": "mean", "teachers": ["a", "b"], "weights": [1.0, 2.0]}
    recipe = load_recipe(_recipe(ensembles={"both": entry, "sure": {"kind": "by_entropy"}}), StudentRecipe)
    stored = recipe.model_dump(mode="json")
    assert stored["ensembles"] == {"both": entry, "sure": {"kind": "by_entropy", "teachers": None}}
    assert load_recipe(stored, StudentRecipe) == recipe


BOTH = {"both": {"kind": "mean"}}


@pytest.mark.parametrize(
    "loss", [{"kind": "dist"}, {"kind": "mean_squared_error"}, {"kind": "kl_divergence", "standardize": True}]
)
def test_a_loss_of_raw_logits_is_refused_by_an_ensemble(
    loss: dict[str, Any], two_teachers: Path, tmp_path: Path
) -> None:
    recipe = student(tmp_path / "run", two_teachers, losses=[loss | {"teacher": "both"}], ensembles=BOTH)
    text = rf"losses.0 \({loss['kind']}\) needs raw logits, the ensemble 'both' is a mean of probabilities. Fix: "
    with pytest.raises(RecipeError, match=text):
        train(recipe)


def test_a_loss_must_choose_between_teachers_and_ensembles(two_teachers: Path, tmp_path: Path) -> None:
    recipe = student(tmp_path / "run", two_teachers, losses=[{"kind": "kl_divergence"}], ensembles=BOTH)
    with pytest.raises(RecipeError, match=r"names no teacher, the cache has \['both', 'first', 'second'\]"):
        train(recipe)


def test_an_ensemble_of_one_cached_teacher_is_refused(cache: Path, tmp_path: Path) -> None:
    losses = [{"kind": "kl_divergence", "teacher": "both"}]
    with pytest.raises(RecipeError, match=r"ensembles.both is made of \['net'\]"):
        train(student(tmp_path / "run", cache, losses=losses, ensembles=BOTH))


def test_confidence_without_any_label_is_refused(caches: Path, tmp_path: Path) -> None:
    modules = {"first": network(1), "second": network(2)}
    path = fill(caches / "unlabelled_two", modules, images=UNLABELLED, views={"num_views": 1})
    losses = [{"kind": "kl_divergence", "teacher": "both"}]
    recipe = student(
        tmp_path / "run", path, dataset=UNLABELLED, losses=losses, ensembles={"both": {"kind": "by_confidence"}}
    )
    with pytest.raises(RecipeError, match=r"ensembles.both \(by_confidence\) needs labels"):
        train(recipe)


LOSSES = [
    {"kind": "kl_divergence", "teacher": "sure", "temperature": 2.0},
    {"kind": "kl_divergence", "teacher": "confident", "temperature": {"kind": "by_confidence", "low": 1, "high": 4}},
    {"kind": "dkd", "teacher": "both", "weight": {"kind": "warm_up", "value": 0.5, "epochs": 2}},
    {
        "kind": "kl_divergence",
        "teacher": "both",
        "temperature": {"kind": "dynamic", "start": 2, "step": 0.1, "min": 1, "max": 3},
    },
]
ENSEMBLES = {
    "both": {"kind": "mean", "teachers": ["first", "second"], "weights": [1, 2]},
    "sure": {"kind": "by_entropy"},
    "confident": {"kind": "by_confidence"},
}


def test_fifty_steps_of_ensembles_from_the_cache_are_fifty_steps_online(two_teachers: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"losses": LOSSES, "ensembles": ENSEMBLES, "batch_size": 20, "epochs": 5}
    modules = {"first": network(1), "second": network(2)}
    with recorded_losses() as cached:
        offline = train(student(tmp_path / "cached", two_teachers, **changes))
    with recorded_losses() as live:
        targets = live_targets(str(two_teachers), "cpu", modules=modules)
        online = train(student(tmp_path / "online", two_teachers, **changes), live=targets)
    assert len(cached) == len(live) == 50
    assert np.abs(np.array(cached) - np.array(live)).max() <= 1e-6
    a, b = (load_file(Path(result.out, "weights.safetensors")) for result in (offline, online))
    assert max(float((a[name] - b[name]).abs().max()) for name in a) <= 1e-6
