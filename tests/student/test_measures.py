"""Counts of answers, against plain loops."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from logitcache.logits import NO_LOGITS
from logitcache.student.evaluation.single_label import GroupAccuracy, Tally, means_of_groups
from logitcache.targets import Targets


def answers(rows: int = 500, classes: int = 12, seed: int = 0) -> tuple[Tensor, Tensor, dict[str, Targets]]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, classes, (rows,), generator=generator)
    helped = torch.nn.functional.one_hot(labels.clamp(min=0), classes) * 2.0
    logits = torch.randn(rows, classes, generator=generator) * 2 + helped
    teachers = {name: Targets(torch.randn(rows, classes, generator=generator) * 2 + helped) for name in ("a", "b")}
    return logits, labels, teachers


def softmax(logits: Tensor) -> np.ndarray:
    p = np.exp(logits.double().numpy() - logits.double().numpy().max(axis=1, keepdims=True))
    return np.asarray(p / p.sum(axis=1, keepdims=True))


def ece_by_hand(p: np.ndarray, labels: list[int]) -> float:
    """Guo et al. 2017, equation 3, by the sets B_m = ((m - 1) / M, m / M] of confidences."""
    total, kept = 0.0, [(row, label) for row, label in zip(p, labels, strict=True) if label >= 0]
    for m in range(1, 16):
        inside = [(row, label) for row, label in kept if (m - 1) / 15 < row.max() <= m / 15]
        if inside:
            accuracy = sum(int(row.argmax() == label) for row, label in inside) / len(inside)
            confidence = sum(row.max() for row, _ in inside) / len(inside)
            total += len(inside) / len(kept) * abs(accuracy - confidence)
    return total


@pytest.mark.parametrize(("rows", "classes"), [(500, 12), (40, 2), (1, 7)])
def test_figures_are_those_of_a_plain_loop(rows: int, classes: int) -> None:
    logits, labels, teachers = answers(rows, classes, seed=rows)
    labels[0] = 1
    found = Tally.of(logits, labels, teachers).measures()
    p, both = softmax(logits), [softmax(targets.logits) for targets in teachers.values()]
    t = (both[0] + both[1]) / 2
    known = [row for row in range(rows) if labels[row] >= 0]
    assert found.top1 == pytest.approx(np.mean([p[row].argmax() == labels[row] for row in known]))
    top5 = np.mean([int(labels[row]) in p[row].argsort()[::-1][:5] for row in known])
    assert found.top5 == (pytest.approx(top5) if p.shape[1] > 5 else None)
    assert found.agreement == pytest.approx(np.mean(p.argmax(axis=1) == t.argmax(axis=1)))
    assert found.kl == pytest.approx(np.mean(np.sum(t * (np.log(t) - np.log(p)), axis=1)), rel=1e-5)
    assert found.teacher_top1 == pytest.approx(np.mean([t[row].argmax() == labels[row] for row in known]))
    assert found.ece == pytest.approx(ece_by_hand(p, labels.tolist()), rel=1e-5)


def test_a_confidence_on_an_edge_is_in_the_bin_below() -> None:
    logits = torch.tensor([[math.log(0.75), math.log(0.25)], [0.0, 0.0], [200.0, -200.0]])
    bins = Tally.of(logits, torch.tensor([0, 1, 0]), {}).bins
    assert np.flatnonzero(bins[:, 0]).tolist() == [7, 11, 14]
    assert bins[14].tolist() == [1.0, 1.0, 1.0]


def test_sure_and_right_answers_are_calibrated_and_sure_and_wrong_ones_are_not() -> None:
    logits = torch.eye(4) * 100
    assert Tally.of(logits, torch.arange(4), {}).measures().ece == pytest.approx(0.0)
    assert Tally.of(logits, (torch.arange(4) + 1) % 4, {}).measures().ece == pytest.approx(1.0)


@given(cut=st.integers(1, 59), seed=st.integers(0, 5))
def test_the_tallies_of_parts_add_up_to_that_of_the_whole(cut: int, seed: int) -> None:
    logits, labels, teachers = answers(60, 5, seed)
    parts = [
        Tally.of(logits[part], labels[part], {name: targets[part] for name, targets in teachers.items()})
        for part in (slice(0, cut), slice(cut, 60))
    ]
    whole, total = Tally.of(logits, labels, teachers), parts[0] + parts[1]
    for name in ("rows", "bins", "classes"):
        np.testing.assert_allclose(getattr(total, name), getattr(whole, name), rtol=1e-9)


def test_classes_are_counted_one_by_one() -> None:
    logits, labels, _ = answers(300, 6)
    labels[labels == 4] = 0
    found = Tally.of(logits, labels, {}).per_class(tuple("abcdef"), np.arange(6))
    best = logits.argmax(dim=1)
    for item in found:
        mine = labels == item.label
        assert (item.name, item.training_images, item.images) == ("abcdef"[item.label], item.label, int(mine.sum()))
        hits = [bool(guess == item.label) for guess in best[mine]]
        assert item.top1 == (pytest.approx(np.mean(hits)) if hits else None)
    assert found[4].top1 is None


def test_images_without_labels_and_without_a_teacher_give_no_figure() -> None:
    found = Tally.of(torch.randn(3, 4), torch.full((3,), -1), {}).measures()
    assert set(vars(found).values()) == {None}


def test_a_teacher_of_features_alone_is_not_compared_with() -> None:
    logits, labels, teachers = answers()
    only = Tally.of(logits, labels, {"a": teachers["a"], "c": Targets(NO_LOGITS)}).measures()
    assert only == Tally.of(logits, labels, {"a": teachers["a"]}).measures()
    assert Tally.of(logits, labels, {"c": Targets(NO_LOGITS)}).measures().agreement is None


def test_groups_are_means_over_the_classes_of_so_many_training_images() -> None:
    counts, top1 = np.array([101, 500, 100, 20, 19, 0, 300]), [0.9, 0.7, 0.6, 0.4, 0.2, 0.0, None]
    found = means_of_groups(top1, counts, 100, 20, GroupAccuracy)
    assert found is not None
    assert [(item.group, item.training_images, item.classes) for item in found] == [
        ("head", "> 100", 2),
        ("medium", "20 to 100", 2),
        ("tail", "< 20", 2),
    ]
    assert [item.top1 for item in found] == pytest.approx([0.8, 0.5, 0.1])
    empty = means_of_groups(top1, counts, 1000, 1001, GroupAccuracy)
    assert empty is not None
    assert [(item.classes, item.top1) for item in empty[:2]] == [(0, None), (0, None)]


def test_groups_are_unknown_where_the_training_images_are() -> None:
    assert means_of_groups([1.0], None, 100, 20, GroupAccuracy) is None
