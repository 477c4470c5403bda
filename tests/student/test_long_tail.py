"""Training on few images of some classes: logit adjustment against its formula, and sampling by class in a run."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from logitcache.errors import RecipeError
from logitcache.student.learner import Learner
from logitcache.student.losses import CrossEntropy
from logitcache.student.losses.base import Context, Site
from logitcache.student.optim.schedules import Progress
from logitcache.student.runs.run_directory import RunDirectory
from logitcache.student.training import train
from logitcache.student.training_data import open_training_data
from logitcache.targets import Batch, MixedLabels, Targets
from logitcache.views.datasets import Bundled, open_dataset
from logitcache.views.sampling import ClassBalanced
from tests.student.small import LINEAR, PARTLY, TEST_IMAGES, fill, metrics, recorded_losses, student, teacher, weights

COUNTS = (900, 50, 1, 0)
BALANCED = {"kind": "class_balanced"}


def context(adapter: nn.Module) -> Context:
    return Context(adapter, Progress(0, 1, 1))


def batch(labels: list[int], mixed: MixedLabels | None = None) -> Batch:
    rows = len(labels)
    empty = torch.zeros(rows, 1, 1, 1, dtype=torch.uint8)
    return Batch(empty, torch.tensor(labels), torch.zeros(rows, 2, dtype=torch.int64), {}, mixed)


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_adjusted_cross_entropy_is_that_of_menon_et_al(tau: float, scale: float) -> None:
    loss = CrossEntropy(logit_adjustment=tau)
    adapter = loss.adapter(Site({}, {}, 951, torch.tensor(COUNTS)))
    logits, labels = torch.randn(6, 4) * scale, [0, 1, 2, 0, 2, -1]
    found = loss(Targets(logits), batch(labels), context(adapter))
    z = logits.double().numpy()[:5]
    # Equation 10: log(1 + Σ_{y' ≠ y} (π_y' / π_y)^τ exp(f_y' - f_y)); a class without images counts as of one.
    pi = np.array([900, 50, 1, 1]) / 952
    rows = []
    for row, y in zip(z, labels[:5], strict=True):
        others = [tau * np.log(pi[k] / pi[y]) + row[k] - row[y] for k in range(4) if k != y]
        rows.append(np.logaddexp.reduce([0.0, *others]))
    assert found.item() == pytest.approx(np.mean(rows), rel=1e-5, abs=1e-6)


def test_without_adjustment_nothing_changes() -> None:
    loss = CrossEntropy()
    logits = torch.randn(3, 4)
    plain = loss(Targets(logits), batch([0, 1, 2]), context(loss.adapter(Site({}, {}, 3))))
    assert plain.item() == pytest.approx(nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2])).item())


def test_equal_frequencies_adjust_nothing() -> None:
    loss = CrossEntropy(logit_adjustment=1.0)
    adapter = loss.adapter(Site({}, {}, 12, torch.full((4,), 3)))
    logits = torch.randn(3, 4)
    plain = nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2]))
    assert loss(Targets(logits), batch([0, 1, 2]), context(adapter)).item() == pytest.approx(plain.item(), rel=1e-6)


def test_mixed_labels_are_adjusted_too() -> None:
    loss = CrossEntropy(logit_adjustment=1.0)
    adapter = loss.adapter(Site({}, {}, 951, torch.tensor(COUNTS)))
    logits, share = torch.randn(2, 4), torch.tensor([0.25, 0.5])
    mixed = loss(Targets(logits), batch([0, 1], MixedLabels(torch.tensor([2, 0]), share)), context(adapter))
    rows = [
        [loss(Targets(logits[n : n + 1]), batch([label]), context(adapter)).item() for label in pair]
        for n, pair in enumerate([(0, 2), (1, 0)])
    ]
    by_hand = np.mean([w * own + (1 - w) * other for w, (own, other) in zip([0.25, 0.5], rows, strict=True)])
    assert mixed.item() == pytest.approx(by_hand, rel=1e-6)


class LongTailed:
    """Bundled images, of which class c keeps 20 - 2 c."""

    def __init__(self) -> None:
        self._images = open_dataset(Bundled(num_images=200))
        seen: Counter[int] = Counter()
        self._kept = []
        for index, label in enumerate(self._images.labels.tolist()):
            seen[label] += 1
            if seen[label] <= 20 - 2 * label:
                self._kept.append(index)

    classes = tuple("abcdefghij")

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Any:
        kept = self._kept[index]
        return self._images.read(kept), int(self._images.labels[kept])


LONG_TAILED = {"kind": "custom", "factory": "tests.student.test_long_tail:LongTailed"}


def test_the_priors_of_a_run_are_those_of_its_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters: list[nn.Module] = []
    start = Learner.__init__

    def spy(self: Learner, *arguments: Any) -> None:
        start(self, *arguments)
        adapters.extend(self.adapters)

    monkeypatch.setattr(Learner, "__init__", spy)
    losses = [{"kind": "cross_entropy", "logit_adjustment": 1.5}]
    train(teacher(tmp_path / "run", dataset=LONG_TAILED, losses=losses, model=LINEAR, validation=None))
    counts = 20 - 2 * np.arange(10)
    expected = 1.5 * np.log(counts / counts.sum())
    assert adapters[0].added.numpy() == pytest.approx(expected, rel=1e-6)  # type: ignore[operator]


def test_a_student_draws_every_class_alike_and_resumes_where_it_was(tmp_path: Path) -> None:
    cache = fill(tmp_path / "cache", images=LONG_TAILED, num_workers=0)
    changes: dict[str, Any] = {"sampling": BALANCED, "model": LINEAR, "epochs": 4, "dataset": LONG_TAILED}
    entry = student(tmp_path / "any", cache, **changes)
    stream = open_training_data(entry).stream([entry])
    drawn = np.concatenate([batch.labels.numpy() for epoch in range(4) for batch in stream.loader.epoch(epoch)])
    assert len(drawn) == 4 * 110
    assert np.bincount(drawn, minlength=10).min() > 20, "of the smallest class there are two images"
    whole = train(student(tmp_path / "whole", cache, **changes))
    _stop_after(tmp_path / "parts", cache, changes)
    parts = train(student(tmp_path / "parts", cache, **changes), resume=True)
    assert weights(whole) == weights(parts)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")


def _stop_after(out: Path, cache: Path, changes: dict[str, Any]) -> None:
    """Train until the third checkpoint, in the middle of an epoch."""

    class Enough(Exception):
        pass

    saved = []
    save = RunDirectory.save_checkpoint

    def stop(self: RunDirectory, state: dict[str, Any]) -> None:
        save(self, state)
        saved.append(state)
        if len(saved) == 3:
            raise Enough

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunDirectory, "save_checkpoint", stop)
        with pytest.raises(Enough):
            train(student(out, cache, **changes, checkpoint_steps=2))


def test_a_teacher_draws_by_class_too(tmp_path: Path) -> None:
    with recorded_losses() as plain:
        train(teacher(tmp_path / "plain", dataset=LONG_TAILED, model=LINEAR))
    with recorded_losses() as balanced:
        train(teacher(tmp_path / "balanced", dataset=LONG_TAILED, model=LINEAR, sampling=BALANCED))
    assert len(plain) == len(balanced)
    assert plain != balanced


def test_images_without_labels_are_not_drawn_by_class(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="133 of 200 have none"):
        train(teacher(tmp_path / "run", dataset=PARTLY, sampling=BALANCED, validation={"dataset": TEST_IMAGES}))


def test_mixing_and_sampling_by_class_are_refused_with_the_recipe(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="logit_adjustment"):
        teacher(tmp_path / "run", mixing=[{"kind": "mixup"}], sampling=BALANCED)


def test_a_recipe_without_sampling_is_one_of_every_image(tmp_path: Path) -> None:
    assert teacher(tmp_path / "run").sampling.kind == "every_image"
    assert teacher(tmp_path / "run", sampling=BALANCED).sampling == ClassBalanced()
