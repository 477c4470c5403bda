"""Every loss against its formula in NumPy, at both ends of the range of logits."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from logitcache.cache.encodings.top_k import TopK
from logitcache.errors import RecipeError
from logitcache.logits import TopKLogits
from logitcache.student.compatibility import asked_targets
from logitcache.student.losses import (
    DIST,
    DKD,
    NKD,
    WSLD,
    BinaryCrossEntropy,
    CrossEntropy,
    KLDivergence,
    Loss,
    MeanSquaredError,
    MultiLabelKL,
    cross_entropy,
    dist,
    dkd,
    kl_divergence,
    mean_squared_error,
    multi_label_kl,
    nkd,
    standardize,
    wsld,
)
from logitcache.student.losses.base import Context, FeatureLoss, HeldTeacher, LossBase, Need
from logitcache.student.optim.schedules import Progress
from logitcache.targets import Batch, MixedLabels, Targets

CLASSES = 7
Array = NDArray[np.float64]
Reference = Callable[[Array, Array, NDArray[np.int64]], float]


def _log_softmax(z: Array) -> Array:
    z = z - z.max(axis=1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def _kl(temperature: float) -> Reference:
    def reference(student: Array, teacher: Array, labels: NDArray[np.int64]) -> float:
        log_s, log_t = _log_softmax(student / temperature), _log_softmax(teacher / temperature)
        return float(temperature**2 * np.mean(np.sum(np.exp(log_t) * (log_t - log_s), axis=1)))

    return reference


def _cross_entropy(smoothing: float) -> Reference:
    def reference(student: Array, teacher: Array, labels: NDArray[np.int64]) -> float:
        rows = np.flatnonzero(labels >= 0)
        if len(rows) == 0:
            return 0.0
        wanted = np.full((len(rows), student.shape[1]), smoothing / student.shape[1])
        wanted[np.arange(len(rows)), labels[rows]] += 1 - smoothing
        return float(-np.mean(np.sum(wanted * _log_softmax(student[rows]), axis=1)))

    return reference


def _squared(student: Array, teacher: Array, labels: NDArray[np.int64]) -> float:
    return float(np.mean((student - teacher) ** 2))


def _standardized(temperature: float) -> Reference:
    def reference(student: Array, teacher: Array, labels: NDArray[np.int64]) -> float:
        s, t = (
            (z - z.mean(axis=1, keepdims=True)) / (1e-7 + z.std(axis=1, ddof=1, keepdims=True))
            for z in (student, teacher)
        )
        return _kl(temperature)(s, t, labels)

    return reference


def _labelled_mean(row: Callable[[Array, Array, int], float]) -> Reference:
    """The mean over the labelled rows of a function of the row's logits and label, 0 without any."""

    def reference(student: Array, teacher: Array, labels: NDArray[np.int64]) -> float:
        rows = [row(s, t, int(y)) for s, t, y in zip(student, teacher, labels, strict=True) if y >= 0]
        return float(np.mean(rows)) if rows else 0.0

    return reference


def _row_log_softmax(z: Array) -> Array:
    return _log_softmax(z[None])[0]


def _dkd(alpha: float, beta: float, temperature: float) -> Reference:
    def row(s: Array, t: Array, y: int) -> float:
        log_s, log_t = _row_log_softmax(s / temperature), _row_log_softmax(t / temperature)
        other_s, other_t = (_row_log_softmax(np.delete(z, y) / temperature) for z in (s, t))
        rest_s, rest_t = (
            np.log(np.sum(np.exp(np.delete(log_p, y) - (m := np.delete(log_p, y).max())))) + m
            for log_p in (log_s, log_t)
        )
        binary = np.exp(log_t[y]) * (log_t[y] - log_s[y]) + np.exp(rest_t) * (rest_t - rest_s)
        others = np.sum(np.exp(other_t) * (other_t - other_s))
        return float(temperature**2 * (alpha * binary + beta * others))

    return _labelled_mean(row)


def _nkd(gamma: float, temperature: float) -> Reference:
    def row(s: Array, t: Array, y: int) -> float:
        other_s, other_t = (_row_log_softmax(np.delete(z, y) / temperature) for z in (s, t))
        own = np.exp(_row_log_softmax(t)[y]) * _row_log_softmax(s)[y]
        return float(-own - gamma * temperature**2 * np.sum(np.exp(other_t) * other_s))

    return _labelled_mean(row)


def _wsld(temperature: float) -> Reference:
    def row(s: Array, t: Array, y: int) -> float:
        weight = 1 - np.exp(_row_log_softmax(s)[y] / (-_row_log_softmax(t)[y] + 1e-7))
        soft = -np.sum(np.exp(_row_log_softmax(t / temperature)) * _row_log_softmax(s / temperature))
        return float(temperature**2 * weight * soft)

    return _labelled_mean(row)


def _dist(beta: float, gamma: float, temperature: float) -> Reference:
    def pearson(log_a: Array, log_b: Array) -> float:
        # Over the largest number, as float64 has no e^-20000; a correlation does not see the difference.
        a, b = (np.exp(log_p - log_p.max()) for log_p in (log_a, log_b))
        return 0.0 if np.ptp(a) == 0 or np.ptp(b) == 0 else float(np.corrcoef(a, b)[0, 1])

    def reference(student: Array, teacher: Array, labels: NDArray[np.int64]) -> float:
        p, q = (_log_softmax(z / temperature) for z in (student, teacher))
        between = np.mean([pearson(a, b) for a, b in zip(p, q, strict=True)])
        within = np.mean([pearson(a, b) for a, b in zip(p.T, q.T, strict=True)])
        return float(temperature**2 * (beta * (1 - between) + gamma * (1 - within)))

    return reference


def _multi_label(temperature: float) -> Reference:
    def reference(student: Array, teacher: Array, labels: NDArray[np.int64]) -> float:
        s, t = student / temperature, teacher / temperature
        p = np.exp(-np.logaddexp(0, -t))
        kl = p * (np.logaddexp(0, -s) - np.logaddexp(0, -t)) + (1 - p) * (np.logaddexp(0, s) - np.logaddexp(0, t))
        return float(temperature**2 * np.mean(kl))

    return reference


class Case(NamedTuple):
    loss: Any
    reference: Reference

    @property
    def name(self) -> str:
        return self.loss.model_dump_json()


TEMPERATURES = (0.5, 1.0, 2.0, 4.0)
TABLE = [
    *(Case(KLDivergence(temperature=t), _kl(t)) for t in TEMPERATURES),
    *(Case(CrossEntropy(label_smoothing=s), _cross_entropy(s)) for s in (0.0, 0.1)),
    *(Case(KLDivergence(standardize=True, temperature=t), _standardized(t)) for t in (1.0, 2.0)),
    Case(MeanSquaredError(), _squared),
    Case(DKD(), _dkd(1.0, 8.0, 4.0)),
    Case(DKD(alpha=0.5, beta=2.0, temperature=1.0), _dkd(0.5, 2.0, 1.0)),
    Case(NKD(), _nkd(1.5, 1.0)),
    Case(NKD(gamma=0.7, temperature=2.0), _nkd(0.7, 2.0)),
    Case(WSLD(), _wsld(2.0)),
    Case(DIST(), _dist(1.0, 1.0, 1.0)),
    Case(DIST(beta=2.0, gamma=0.5, temperature=4.0), _dist(2.0, 0.5, 4.0)),
    *(Case(MultiLabelKL(temperature=t), _multi_label(t)) for t in (1.0, 3.0)),
]
every_loss = pytest.mark.parametrize("case", TABLE, ids=lambda case: case.name)


def _random(rows: int, scale: float, seed: int) -> Tensor:
    return torch.randn(rows, CLASSES, generator=torch.Generator().manual_seed(seed)) * scale


def _extreme(rows: int, seed: int) -> Tensor:
    return torch.where(_random(rows, 1.0, seed) > 0.5, 1e4, -1e4)


INPUTS = {
    "random": (_random(9, 3.0, 0), _random(9, 3.0, 1)),
    "wide": (_random(9, 40.0, 2), _random(9, 40.0, 3)),
    "extreme": (_extreme(9, 4), _extreme(9, 5)),
    "extreme student": (_extreme(9, 6), _random(9, 1.0, 7)),
    "extreme teacher": (_random(9, 1.0, 8), _extreme(9, 9)),
    "one row": (_random(1, 3.0, 10), _random(1, 3.0, 11)),
    "constant": (torch.zeros(4, CLASSES), torch.full((4, CLASSES), -1e4)),
}


def _labels(rows: int) -> Tensor:
    return torch.arange(rows) * 3 % CLASSES


def _batch(teacher: Any, labels: Tensor) -> Batch:
    rows = len(labels)
    return Batch(torch.zeros(rows, 1, 1, 1, dtype=torch.uint8), labels, torch.zeros(rows, 2), {"t": Targets(teacher)})


def _call(loss: Any, student: Tensor, batch: Batch) -> Tensor:
    value: Tensor = loss(Targets(student), batch, Context(nn.Identity(), Progress(0, 1, 1)))
    return value


def _value(loss: Any, student: Tensor, teacher: Any, labels: Tensor | None = None) -> Tensor:
    return _call(loss, student, _batch(teacher, _labels(len(student)) if labels is None else labels))


def _expected(case: Case, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> float:
    labels = _labels(len(student)) if labels is None else labels
    return case.reference(student.double().numpy(), teacher.double().numpy(), labels.numpy())


def test_the_table_holds_every_loss_on_logits() -> None:
    union = {loss for loss in get_args(get_args(Loss)[0]) if not issubclass(loss, FeatureLoss | BinaryCrossEntropy)}
    assert {type(case.loss) for case in TABLE} == union


@every_loss
@pytest.mark.parametrize("name", INPUTS)
def test_a_loss_is_its_formula(case: Case, name: str) -> None:
    student, teacher = INPUTS[name]
    value = _value(case.loss, student, teacher)
    assert value.dtype == torch.float32
    assert value.shape == ()
    np.testing.assert_allclose(value.item(), _expected(case, student, teacher), rtol=1e-5, atol=1e-5)


@every_loss
@pytest.mark.parametrize("name", INPUTS)
def test_gradients_are_finite(case: Case, name: str) -> None:
    student = INPUTS[name][0].clone().requires_grad_()
    _value(case.loss, student, INPUTS[name][1]).backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


differentiated = pytest.mark.parametrize(
    # WSLD's weights are constants to its gradient, by definition.
    "case",
    [case for case in TABLE if not isinstance(case.loss, WSLD)],
    ids=lambda case: case.name,
)


@differentiated
def test_the_gradient_is_that_of_the_value(case: Case) -> None:
    student, teacher = (logits.double() for logits in INPUTS["random"])
    assert torch.autograd.gradcheck(lambda z: _value(case.loss, z, teacher), student.requires_grad_())


@differentiated
def test_the_gradient_of_one_row_is_that_of_the_value(case: Case) -> None:
    student, teacher = (logits.double() for logits in INPUTS["one row"])
    assert torch.autograd.gradcheck(lambda z: _value(case.loss, z, teacher), student.requires_grad_())


@pytest.mark.parametrize(
    "loss",
    [*(KLDivergence(temperature=t) for t in TEMPERATURES), MeanSquaredError(), DKD(), MultiLabelKL(temperature=2.0)],
)
@pytest.mark.parametrize("name", INPUTS)
def test_a_student_that_says_what_the_teacher_says_has_no_loss_and_no_gradient(loss: Any, name: str) -> None:
    teacher = INPUTS[name][1]
    student = teacher.clone().requires_grad_()
    value = _value(loss, student, teacher)
    value.backward()
    assert value.item() == 0
    assert student.grad is not None
    assert student.grad.abs().max() <= 1e-6


@pytest.mark.parametrize("loss", [KLDivergence(standardize=True), DIST(temperature=2.0)])
def test_losses_that_forgive_scale_are_zero_where_both_agree_but_for_it(loss: Any) -> None:
    _, teacher = INPUTS["random"]
    student = (3 * teacher + 5 if isinstance(loss, KLDivergence) else teacher).clone().requires_grad_()
    value = _value(loss, student, teacher)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-5)
    assert student.grad is not None
    assert student.grad.abs().max() <= 1e-5


@pytest.mark.parametrize("loss", [NKD(), WSLD()])
def test_soft_cross_entropies_are_smallest_where_both_agree(loss: Any) -> None:
    """WSLD at a fixed weight; NKD in the other classes, as it wants the label surer than the teacher is."""
    _, teacher = INPUTS["random"]
    place = _labels(9)[:, None]
    if isinstance(loss, NKD):
        student = teacher.clone().requires_grad_()
        _value(loss, student, teacher).backward()
        assert student.grad is not None
        p = torch.softmax(teacher, dim=1)
        own = p.gather(1, place)
        # What is left is the gradient of -p_t[y] log p_s[y].
        expected = own * (p - torch.zeros_like(p).scatter(1, place, 1.0)) / 9
        torch.testing.assert_close(student.grad, expected, atol=1e-6, rtol=1e-4)
    else:
        student = teacher.clone().requires_grad_()
        _value(loss, student, teacher).backward()
        assert student.grad is not None
        assert student.grad.abs().max() <= 1e-6


def test_dkd_with_the_weight_of_the_rest_is_the_kl_divergence() -> None:
    """Equation 7 of the paper: KD = TCKD + (1 - p_y) NCKD, here for one row at a time."""
    student, teacher = INPUTS["random"]
    for row in range(9):
        s, t, label = student[row : row + 1], teacher[row : row + 1], _labels(9)[row : row + 1]
        rest = 1 - torch.softmax(t / 2, dim=1)[0, label[0]].item()
        found = dkd(s, t, label, alpha=1.0, beta=rest, temperature=2.0)
        torch.testing.assert_close(found, kl_divergence(s, t, 2.0), rtol=1e-4, atol=1e-6)


def test_a_sure_and_right_student_has_no_cross_entropy() -> None:
    logits = torch.nn.functional.one_hot(_labels(5), CLASSES) * 2e4 - 1e4
    assert cross_entropy(logits.float(), _labels(5)).item() == 0


@every_loss
@pytest.mark.parametrize("labels", [[2, -1, -1, 0, 3, -1, -1, 1, -1], [-1] * 9, [0] * 9], ids=["some", "none", "all"])
def test_rows_without_a_label_do_not_count(case: Case, labels: list[int]) -> None:
    student, teacher = INPUTS["random"]
    given = student.clone().requires_grad_()
    value = _value(case.loss, given, teacher, torch.tensor(labels))
    value.backward()
    expected = _expected(case, student, teacher, torch.tensor(labels))
    np.testing.assert_allclose(value.item(), expected, rtol=1e-5, atol=1e-6)
    assert given.grad is not None
    assert torch.isfinite(given.grad).all()


def test_only_labelled_rows_have_a_gradient_of_cross_entropy() -> None:
    student = _random(4, 1.0, 12).requires_grad_()
    cross_entropy(student, torch.tensor([-1, 2, -1, 0])).backward()
    assert student.grad is not None
    assert (student.grad.abs().sum(dim=1) > 0).tolist() == [False, True, False, True]


@pytest.mark.parametrize("case", [case for case in TABLE if case.loss.by_row], ids=lambda case: case.name)
@pytest.mark.parametrize("size", [1, 2, 4, 9])
def test_the_parts_of_a_batch_sum_to_the_whole(case: Case, size: int) -> None:
    student, teacher = INPUTS["random"]
    whole = _batch(teacher, torch.tensor([2, -1, -1, 0, 3, -1, -1, 1, -1]))
    total = torch.zeros(())
    for start in range(0, 9, size):
        rows = slice(start, start + size)
        part = whole[rows]
        total += _call(case.loss, student[rows], part) * case.loss.rows(part) / case.loss.rows(whole)
    np.testing.assert_allclose(total.item(), _call(case.loss, student, whole).item(), rtol=1e-5)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_arithmetic_is_float32_whatever_autocast_says(case: Case, dtype: torch.dtype) -> None:
    student, teacher = (logits.to(dtype) for logits in INPUTS["random"])
    with torch.autocast("cpu", torch.bfloat16):
        value = _value(case.loss, student, teacher)
    assert value.dtype == torch.float32
    assert value.item() == _value(case.loss, student.float(), teacher.float()).item()
    np.testing.assert_allclose(value.item(), _expected(case, student, teacher), rtol=1e-5)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_kl_divergence_does_not_see_a_constant_added_to_the_logits(temperature: float) -> None:
    student, teacher = INPUTS["random"]
    moved = kl_divergence(student + 5, teacher - 3, temperature)
    torch.testing.assert_close(moved, kl_divergence(student, teacher, temperature), rtol=1e-4, atol=1e-6)


def test_the_functions_are_what_the_components_compute() -> None:
    student, teacher = INPUTS["random"]
    assert kl_divergence(student, teacher, 2.0) == _value(KLDivergence(temperature=2.0), student, teacher)
    assert mean_squared_error(student, teacher) == _value(MeanSquaredError(), student, teacher)
    assert cross_entropy(student, _labels(9), 0.1) == _value(CrossEntropy(label_smoothing=0.1), student, teacher)
    assert dkd(student, teacher, _labels(9)) == _value(DKD(), student, teacher)
    assert nkd(student, teacher, _labels(9)) == _value(NKD(), student, teacher)
    assert wsld(student, teacher, _labels(9)) == _value(WSLD(), student, teacher)
    assert dist(student, teacher) == _value(DIST(), student, teacher)
    assert multi_label_kl(student, teacher) == _value(MultiLabelKL(), student, teacher)
    standardized = kl_divergence(standardize(student), standardize(teacher), 2.0)
    assert standardized == _value(KLDivergence(standardize=True, temperature=2.0), student, teacher)


def _encoded(teacher: Tensor, k: int) -> Any:
    encoding = TopK(k=k)
    return encoding.decode(encoding.encode(teacher), CLASSES)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_kl_divergence_to_all_classes_of_a_top_k_target_is_that_to_its_logits(temperature: float) -> None:
    student, teacher = INPUTS["random"]
    log_p = torch.log_softmax(teacher, dim=1)
    kept, index = log_p.sort(dim=1, descending=True)
    target = TopKLogits(kept, index, torch.zeros(len(teacher), 3), CLASSES)
    torch.testing.assert_close(
        kl_divergence(student, target, temperature), kl_divergence(student, teacher, temperature), rtol=1e-5, atol=1e-6
    )


def test_kl_divergence_to_a_top_k_target_spreads_the_tail_evenly() -> None:
    student, teacher = INPUTS["random"]
    log_t = _log_softmax(teacher.double().numpy())
    p = np.exp(log_t)
    for row in p:
        dropped = np.argsort(row)[: CLASSES - 2]
        row[dropped] = row[dropped].mean()
    log_s = _log_softmax(student.double().numpy())
    expected = np.mean(np.sum(p * (np.log(p) - log_s), axis=1))
    # float16 keeps log-probabilities to about three digits
    np.testing.assert_allclose(kl_divergence(student, _encoded(teacher, 2)).item(), expected, rtol=5e-3)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", INPUTS)
def test_a_top_k_target_gives_finite_losses_and_gradients(name: str, temperature: float) -> None:
    student, teacher = INPUTS[name][0].clone().requires_grad_(), INPUTS[name][1]
    value = kl_divergence(student, _encoded(teacher, 3), temperature)
    value.backward()
    assert torch.isfinite(value)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("loss", [KLDivergence(teacher="other"), MeanSquaredError(teacher="other")])
def test_a_teacher_that_is_not_there_is_named(loss: Any) -> None:
    with pytest.raises(RecipeError, match=r"teacher 'other'; the cache has \['t'\]"):
        _value(loss, *INPUTS["random"])


def test_a_loss_must_choose_between_two_teachers() -> None:
    student, teacher = INPUTS["random"]
    batch = _batch(teacher, _labels(9))
    both = Batch(batch.images, batch.labels, batch.keys, {"a": Targets(student), "b": Targets(teacher)})
    with pytest.raises(RecipeError, match="set the loss's `teacher`"):
        _call(KLDivergence(), student, both)
    assert _call(KLDivergence(teacher="a"), student, both) == 0
    assert _call(KLDivergence(teacher="b"), student, both) > 0


def test_logits_of_other_classes_are_not_broadcast() -> None:
    with pytest.raises(RuntimeError):
        kl_divergence(torch.zeros(2, 3), torch.zeros(2, 4))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixed_labels_are_weighted_as_a_soft_label_would_be(smoothing: float) -> None:
    student, labels = _random(9, 3.0, 0), _labels(9)
    partners, share = labels.flip(0), torch.linspace(0, 1, 9)
    labels[2] = partners[5] = partners[8] = -1
    known = (labels >= 0) & (partners >= 0)
    soft = torch.zeros(9, CLASSES, dtype=torch.float64)
    for row in known.nonzero().ravel().tolist():
        soft[row, labels[row]] += share[row].double()
        soft[row, partners[row]] += 1 - share[row].double()
    soft = soft * (1 - smoothing) + smoothing / CLASSES
    log_p = torch.from_numpy(_log_softmax(student.double().numpy()))
    expected = -(soft * log_p).sum(dim=1)[known].mean()
    loss = CrossEntropy(label_smoothing=smoothing)
    batch = replace(_batch(student, labels), mixed=MixedLabels(partners, share))
    assert float(_call(loss, student, batch)) == pytest.approx(float(expected), rel=1e-5)
    assert int(loss.rows(batch)) == int(known.sum()) == 6


def test_cross_entropy_of_unmixed_rows_is_that_without_mixing() -> None:
    student, labels = _random(9, 3.0, 0), _labels(9)
    mixed = MixedLabels(labels, torch.ones(9))
    assert torch.equal(cross_entropy(student, labels, 0.1, mixed), cross_entropy(student, labels, 0.1))


@pytest.mark.parametrize("classes", [2, 10, 1000, 21841])
@pytest.mark.parametrize("scale", [1.0, 3.0, 40.0])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dist_of_equal_logits_is_zero_at_any_number_of_classes(classes: int, scale: float, temperature: float) -> None:
    logits = torch.randn(32, classes, generator=torch.Generator().manual_seed(0)) * scale
    student = logits.clone().requires_grad_()
    value = dist(student, logits, temperature=temperature)
    value.backward()
    assert abs(value.item()) <= 2e-5 * temperature**2
    assert student.grad is not None
    assert student.grad.abs().max() <= 1e-3


@pytest.mark.parametrize("classes", [10, 1000])
def test_dist_is_what_its_authors_compute(classes: int) -> None:
    """Their 1e-8 is added to the product of norms, here far larger."""

    def pearson(a: Tensor, b: Tensor) -> Tensor:
        a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
        return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)

    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(64, classes, generator=generator, dtype=torch.float64) for _ in range(2))
    p, q = student.softmax(1), teacher.softmax(1)
    expected = 2 - pearson(p, q).mean() - pearson(p.T, q.T).mean()
    torch.testing.assert_close(dist(student.float(), teacher.float()).double(), expected, rtol=2e-4, atol=0)


@pytest.mark.parametrize("which", ["student", "teacher", "both"])
def test_dist_of_rows_without_variance_is_finite_and_says_that_nothing_correlates(which: str) -> None:
    logits = torch.randn(8, 1000, generator=torch.Generator().manual_seed(0))
    constant = torch.full((8, 1000), 3.3)
    student = (logits if which == "teacher" else constant).clone().requires_grad_()
    value = dist(student, logits if which == "student" else constant)
    value.backward()
    assert value.item() == pytest.approx(2, abs=1e-5)
    assert student.grad is not None
    assert student.grad.isfinite().all()


class Bare(LossBase):
    """A loss that declares neither `teacher` nor `weight`."""

    asks: ClassVar[frozenset[Need]] = frozenset({"logits"})

    kind: Literal["bare"] = "bare"

    def __call__(self, outputs: Targets, batch: Batch, context: Context) -> Tensor:
        return outputs.logits.mean()


def test_a_loss_without_teacher_and_weight_asks_the_only_teacher_and_counts_as_1() -> None:
    bare: Any = Bare()
    assert asked_targets([bare], {}, {"net": HeldTeacher(3, {})}) == {"net": ["logits"]}
    assert bare.weight.at(Progress(0, 1, 1)) == 1.0
    assert bare.model_dump() == {"kind": "bare"}
