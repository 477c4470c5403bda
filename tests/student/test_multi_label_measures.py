"""Figures of a yes or no to every class, against plain loops."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from logitcache.cache.encodings.top_k import TopK
from logitcache.logits import NO_LOGITS
from logitcache.student.evaluation.multi_label import MultiLabelTally
from logitcache.targets import Targets


def answers(rows: int = 200, classes: int = 6, seed: int = 0) -> tuple[Tensor, Tensor, dict[str, Targets]]:
    """Logits in steps, so that many are equal, labels of which some are unknown, and two teachers."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, 2, (rows, classes), generator=generator).to(torch.int8)
    shift = labels.float()
    logits = ((torch.randn(rows, classes, generator=generator) * 2 + shift) * 4).round() / 4
    teachers = {name: Targets(torch.randn(rows, classes, generator=generator) * 3 + shift) for name in ("a", "b")}
    return logits, labels, teachers


def sigmoid(logits: Tensor) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-logits.double().numpy())))


def average_precision(scores: list[float], labels: list[int]) -> float | None:
    """Σ over thresholds, from the highest score down, of what recall gains, times precision."""
    pairs = [(score, label) for score, label in zip(scores, labels, strict=True) if label >= 0]
    positives = sum(label for _, label in pairs)
    if positives == 0:
        return None
    total, recall = 0.0, 0.0
    for threshold in sorted({score for score, _ in pairs}, reverse=True):
        taken = [label for score, label in pairs if score >= threshold]
        total += (sum(taken) / positives - recall) * sum(taken) / len(taken)
        recall = sum(taken) / positives
    return total


def f1(scores: list[float], labels: list[int], threshold: float) -> float:
    right = sum(score > threshold and label == 1 for score, label in zip(scores, labels, strict=True))
    wrong = sum(score > threshold and label == 0 for score, label in zip(scores, labels, strict=True))
    missed = sum(score <= threshold and label == 1 for score, label in zip(scores, labels, strict=True))
    return 2 * right / (2 * right + wrong + missed) if right + wrong + missed else 0.0


@pytest.mark.parametrize(("rows", "classes", "threshold"), [(200, 6, 0.5), (60, 3, 0.2), (1, 4, 0.5)])
def test_figures_are_those_of_a_plain_loop(rows: int, classes: int, threshold: float) -> None:
    logits, labels, teachers = answers(rows, classes, seed=rows)
    labels[0] = torch.tensor([1, 0, -1, 1, 0, 0][:classes])
    tally = MultiLabelTally.of(logits, labels, teachers, threshold)
    found, p = tally.measures(), sigmoid(logits)
    t = (sigmoid(teachers["a"].logits) + sigmoid(teachers["b"].logits)) / 2
    columns, known = labels.T.tolist(), [label for row in labels.tolist() for label in row]
    there = [c for c in range(classes) if 1 in columns[c]]
    own = [average_precision(p[:, c].tolist(), columns[c]) for c in range(classes)]
    of_teacher = [average_precision(t[:, c].tolist(), columns[c]) for c in range(classes)]
    assert found.mean_ap == pytest.approx(np.mean([own[c] for c in there]))  # type: ignore[arg-type]
    assert found.teacher_mean_ap == pytest.approx(np.mean([of_teacher[c] for c in there]))  # type: ignore[arg-type]
    assert found.f1_macro == pytest.approx(np.mean([f1(p[:, c].tolist(), columns[c], threshold) for c in there]))
    assert found.f1_micro == pytest.approx(f1(p.flatten().tolist(), known, threshold))
    assert found.agreement == pytest.approx(np.mean((p > threshold) == (t > threshold)))
    kl = t * np.log(t / p) + (1 - t) * np.log((1 - t) / (1 - p))
    assert found.kl == pytest.approx(kl.mean())
    for item in tally.per_class(tuple("abcdef"), np.arange(classes)):
        assert item.name == "abcdef"[item.label]
        assert item.training_images == item.label
        assert item.images == columns[item.label].count(1)
        assert item.average_precision == pytest.approx(own[item.label])
        wanted = f1(p[:, item.label].tolist(), columns[item.label], threshold) if item.images else None
        assert item.f1 == pytest.approx(wanted)


@pytest.mark.parametrize("cut", [1, 50, 199])
def test_the_tallies_of_parts_add_up_to_that_of_the_whole(cut: int) -> None:
    logits, labels, teachers = answers()
    parts = [
        MultiLabelTally.of(logits[rows], labels[rows], {name: targets[rows] for name, targets in teachers.items()}, 0.3)
        for rows in (slice(0, cut), slice(cut, None))
    ]
    whole = MultiLabelTally.of(logits, labels, teachers, 0.3)
    both = parts[0] + parts[1]
    assert both.measures().mean_ap == whole.measures().mean_ap
    assert both.measures().kl == pytest.approx(whole.measures().kl)
    assert both.per_class() == whole.per_class()


def test_a_teacher_that_is_repeated_is_agreed_with_at_extreme_logits_too() -> None:
    logits = torch.tensor([[1e4, -1e4, 300.0], [500.0, -3e3, -1e4], [1e3, 0.5, 200.0]])
    labels = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 0, 0]], dtype=torch.int8)
    found = MultiLabelTally.of(logits, labels, {"t": Targets(logits)}).measures()
    assert (found.agreement, found.kl) == (1, 0)
    assert found.mean_ap == found.teacher_mean_ap == pytest.approx((1 + 1 / 2 + 1) / 3)  # not all the same as σ is 1


def test_what_is_not_known_gives_no_figure() -> None:
    logits, labels, _ = answers(20)
    nothing = MultiLabelTally.of(logits, torch.full_like(labels, -1), {}).measures()
    assert {nothing.mean_ap, nothing.f1_macro, nothing.f1_micro, nothing.agreement, nothing.kl} == {None}
    never = MultiLabelTally.of(logits, torch.zeros_like(labels), {}).measures()
    assert (never.mean_ap, never.f1_macro, never.f1_micro) == (None, None, 0)
    top_k = TopK(k=2)
    few = Targets(top_k.decode(top_k.encode(logits), 6))
    for teachers in ({"t": few}, {"t": Targets(NO_LOGITS)}, {"t": few, "u": Targets(logits)}):
        found = MultiLabelTally.of(logits, labels, teachers).measures()
        assert found.agreement is found.kl is found.teacher_mean_ap is None
        assert found.quality is not None


def test_groups_are_means_over_the_classes_of_so_many_training_images() -> None:
    logits, labels, _ = answers(100)
    labels[:, 5] = 0
    tally = MultiLabelTally.of(logits, labels, {})
    precisions = [item.average_precision for item in tally.per_class()]
    groups = tally.groups(np.array([500, 101, 100, 20, 19, 500]), 100, 20)
    assert groups is not None
    assert [(item.group, item.classes) for item in groups] == [("head", 2), ("medium", 2), ("tail", 1)]
    assert groups[0].mean_ap == pytest.approx(math.fsum(precisions[:2]) / 2)  # type: ignore[arg-type]
    assert groups[2].mean_ap == precisions[4]
    assert tally.groups(None, 100, 20) is None
