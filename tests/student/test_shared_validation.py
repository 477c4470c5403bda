"""Several processes measure as one does: every image once, and the same sums."""

import dataclasses
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from logitcache.errors import DataError
from logitcache.models import Classifier, load_model
from logitcache.student.distributed.ranks import joined
from logitcache.student.evaluation.evaluate import evaluate
from logitcache.student.evaluation.multi_label import MultiLabelTally
from logitcache.student.evaluation.single_label import Tally
from logitcache.student.evaluation.validation import AnyTally, Validator, open_validator
from logitcache.targets import Batch
from tests.student.attributes import MANY, TEST_MANY, fill_many
from tests.student.attributes import network as network_of_attributes
from tests.student.ranks import seen, together, train_together
from tests.student.small import GREY, TEST_IMAGES, TINY, metrics, network, student

CPU = torch.device("cpu")

# Python 3.12 warns of every fork of a process with threads; the children use none of them.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture(autouse=True)
def _on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


def _parts(recipe: Any, size: int, model: nn.Module, classes: int, out: Path) -> list[tuple[AnyTally, list[int]]]:
    """Measure on several ranks; returns of each the sum that it got, and the images that it ran the model on."""

    def work(rank: int) -> None:
        validator, indices = open_validator(recipe, classes), []
        assert validator is not None
        batches = validator.batches

        def noted(*arguments: Any) -> Iterator[Batch]:
            for batch in batches(*arguments):
                indices.extend(batch.keys[:, 1].tolist())
                yield batch

        validator.batches = noted  # type: ignore[assignment, method-assign]
        with joined() as ranks:
            tally = validator.tally(model, CPU, ranks=ranks)
        (out / f"{rank}.pickle").write_bytes(pickle.dumps((tally, indices)))

    assert together(size, out, work) == [(0, "")] * size
    return [pickle.loads((out / f"{rank}.pickle").read_bytes()) for rank in range(size)]


# Three batches of 40, 40 and 20 images, two of 60 and 40, and one of 100: a rank of three has none, then two have none.
@pytest.mark.parametrize(("size", "batch_size"), [(2, 40), (3, 60), (3, 100)])
def test_ranks_count_what_one_process_counts(
    size: int, batch_size: int, cache: Path, untouched: Path, tmp_path: Path
) -> None:
    validation = {"cache": str(untouched), "batch_size": batch_size}
    recipe, model = student(tmp_path / "any", cache, validation=validation), Classifier(network(), GREY)
    validator = open_validator(recipe, 10)
    assert validator is not None
    alone = validator.tally(model, CPU)
    assert isinstance(alone, Tally)
    parts = _parts(recipe, size, model, 10, tmp_path / "ranks")
    assert [index for _, indices in parts for index in indices] == list(range(100))
    for tally, _ in parts:
        assert isinstance(tally, Tally)
        counts = [0, 1, 2, 3, 4, 6]  # all but the sum of KL
        assert tally.rows[counts].tolist() == alone.rows[counts].tolist()
        assert tally.bins[:, :2].tolist() == alone.bins[:, :2].tolist()
        assert tally.classes.tolist() == alone.classes.tolist()
        np.testing.assert_allclose(tally.rows, alone.rows, rtol=1e-12)
        np.testing.assert_allclose(tally.bins, alone.bins, rtol=1e-12)


def test_ranks_keep_the_answers_of_any_number_of_classes_in_order(tmp_path: Path, caches: Path) -> None:
    cache = fill_many(caches / "many for ranks")
    taught = fill_many(caches / "many to measure on", images=TEST_MANY, views={})
    validation = {"cache": str(taught), "dataset": TEST_MANY, "batch_size": 40}
    entries = {"losses": [{"kind": "multi_label_kl"}], "dataset": MANY, "validation": validation}
    recipe, model = student(tmp_path / "any", cache, **entries), Classifier(network_of_attributes(2), GREY)
    validator = open_validator(recipe, 5)
    assert validator is not None
    alone = validator.tally(model, CPU)
    assert isinstance(alone, MultiLabelTally)
    for tally, _ in _parts(recipe, 2, model, 5, tmp_path / "ranks"):
        assert isinstance(tally, MultiLabelTally)
        assert tally.measures() == alone.measures()
        assert np.array_equal(tally.logits, alone.logits)


def test_ranks_with_statistics_of_their_own_measure_the_model_that_is_kept(
    cache: Path, untouched: Path, tmp_path: Path
) -> None:
    validation = {"cache": str(untouched), "batch_size": 40}
    for name, changes in (("run", {}), ("ema", {"ema": 0.9})):
        recipe = student(tmp_path / name, cache, model=TINY, validation=validation, epochs=1, **changes)
        assert train_together(3, recipe) == [(0, "")] * 3
        kept = dataclasses.asdict(evaluate(tmp_path / name).measures)
        assert {key: metrics(tmp_path / name)[-1][f"val_{key}"] for key in kept} == pytest.approx(kept, rel=1e-12)


def test_measuring_moves_no_weight_of_several_ranks(cache: Path, tmp_path: Path) -> None:
    entries: dict[str, Any] = {"model": TINY}
    plain = student(tmp_path / "plain", cache, **entries)
    measured = student(tmp_path / "measured", cache, **entries, validation={"dataset": TEST_IMAGES, "batch_size": 60})
    for recipe in (plain, measured):
        assert train_together(2, recipe) == [(0, "")] * 2
    assert [rank["weights"] for rank in seen(plain, 2)] == [rank["weights"] for rank in seen(measured, 2)]
    states = [load_model(Path(recipe.out)).module.state_dict() for recipe in (plain, measured)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_an_error_of_a_rank_that_measures_ends_all_and_is_shown_once(cache: Path, tmp_path: Path) -> None:
    recipe = student(tmp_path / "run", cache, epochs=1, validation={"dataset": TEST_IMAGES})

    def fail(*arguments: Any) -> Any:
        raise DataError("image 7 cannot be read")

    def before(rank: int) -> None:
        if rank == 1:
            Validator.batches = fail  # type: ignore[assignment, method-assign]

    ended = train_together(2, recipe, before=before)
    assert [code for code, _ in ended] == [2] * 2
    assert ["image 7 cannot be read" in text for _, text in ended] == [False, True]
