"""Every loss on features against its formula in NumPy, at both ends of the range of features."""

from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from logitcache.errors import RecipeError
from logitcache.reductions import FeatureKind, FeatureShape
from logitcache.student import losses
from logitcache.student.losses import (
    CKA,
    CRD,
    PKT,
    RKD,
    SRRL,
    VID,
    AttentionTransfer,
    GradCAM,
    Hint,
    Loss,
    Similarity,
)
from logitcache.student.losses.base import Context, FeatureLoss, HeldTeacher, Site
from logitcache.student.optim.schedules import Progress, constant
from logitcache.targets import Batch, Targets

NUM_IMAGES, CLASSES, ROWS = 40, 5, 6
Array = NDArray[np.float64]
State = dict[str, Array]
Reference = Callable[[Array, Array, State, "Setting"], float]


class Setting(NamedTuple):
    """What a batch has beside features: classes for Grad-CAM, the teacher's logits and the image of each row."""

    classes: NDArray[np.int64]
    logits: Array
    images: NDArray[np.int64]


class Case(NamedTuple):
    loss: Any
    student: tuple[int, ...]
    kind: FeatureKind
    teacher: tuple[int, ...]
    reference: Reference

    @property
    def name(self) -> str:
        return f"{self.loss.kind}-{self.student}-{self.kind}-{self.teacher}".replace(" ", "")


# The reductions, written again.


def _pooled(features: Array) -> Array:
    return features.mean(axis=tuple(range(2, features.ndim))) if features.ndim != 3 else features.mean(axis=1)


def _maps(features: Array) -> Array:
    """Maps as they are; tokens as a square without the class token."""
    if features.ndim == 4:
        return features
    side = int(np.sqrt(features.shape[1]))
    patches = features[:, features.shape[1] - side * side :]
    return np.moveaxis(patches.reshape(len(features), side, side, -1), 3, 1)


def _resized(maps: Array, size: tuple[int, int]) -> Array:
    """Means over blocks where that is smaller, and whole; else bilinear, of half-pixel centres."""
    for axis, count in zip((-2, -1), size, strict=True):
        have = maps.shape[axis]
        weights = np.zeros((count, have))
        for place in range(count):
            if count <= have:
                assert have % count == 0
                block = have // count
                weights[place, place * block : (place + 1) * block] = 1 / block
            else:
                at = max(0.0, (place + 0.5) * have / count - 0.5)
                low = min(int(at), have - 1)
                weights[place, low] += 1 - (at - low)
                weights[place, min(low + 1, have - 1)] += at - low
        maps = np.moveaxis(np.moveaxis(maps, axis, -1) @ weights.T, -1, axis)
    return maps


def _unit(vectors: Array) -> Array:
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)


def _rows(features: Array) -> Array:
    return features.reshape(len(features), -1)


def _linear(state: State, prefix: str, features: Array) -> Array:
    found = features @ state[f"{prefix}weight"].T
    return found + state[f"{prefix}bias"] if f"{prefix}bias" in state else found


def _places(student: Array, teacher: Array) -> tuple[Array, Array]:
    """Features at the same places, the channels last."""
    if teacher.ndim == 2:
        return _pooled(student), teacher
    if student.ndim == teacher.ndim == 3 and student.shape[1] == teacher.shape[1]:
        return student, teacher
    wanted = _maps(teacher)
    return np.moveaxis(_resized(_maps(student), wanted.shape[2:]), 1, 3), np.moveaxis(wanted, 1, 3)


# The formulas.


def _hint(student: Array, teacher: Array, state: State, setting: Setting) -> float:
    given, wanted = _places(student, teacher)
    return float(np.mean((_linear(state, "", given) - wanted) ** 2))


def _vid(student: Array, teacher: Array, state: State, setting: Setting) -> float:
    mean, wanted = _places(student, teacher)
    for layer in (0, 2, 4):
        mean = _linear(state, f"mean.{layer}.", np.maximum(mean, 0) if layer else mean)
    variance = np.logaddexp(0, state["alpha"]) + 1e-5
    return float(np.mean(0.5 * ((mean - wanted) ** 2 / variance + np.log(variance))))


def _attention_transfer(student: Array, teacher: Array, state: State, setting: Setting) -> float:
    wanted = teacher if teacher.ndim == 3 and teacher.shape[1] == teacher.shape[2] else None
    if wanted is None:
        wanted = np.mean(_maps(teacher) ** 2, axis=1) if teacher.ndim > 2 else _maps(teacher[:, :, None])[:, 0]
    found = np.mean(_resized(_maps(student), wanted.shape[1:]) ** 2, axis=1)
    return float(np.mean((_unit(_rows(found)) - _unit(_rows(wanted))) ** 2))


def _grad_cam(student: Array, teacher: Array, state: State, setting: Setting) -> float:
    """Of the logits of `_answer`, whose gradient is 2 W f over the number of places."""
    channels = student.reshape(*student.shape[:2], -1) if student.ndim == 4 else np.moveaxis(student, 2, 1)
    weight = HEAD[:, : channels.shape[1]].double().numpy()[setting.classes]
    slopes = 2 * weight[:, :, None] * channels / channels.shape[2]
    evidence = np.maximum(np.sum(slopes.mean(axis=2, keepdims=True) * channels, axis=1), 0)
    found = evidence.reshape(-1, *student.shape[2:]) if student.ndim == 4 else _maps(evidence[:, :, None])[:, 0]
    wanted = teacher if teacher.ndim == 3 else _maps(teacher[:, :, None])[:, 0]
    return float(np.mean((_unit(_rows(_resized(found, wanted.shape[1:]))) - _unit(_rows(wanted))) ** 2))


def _similarity(student: Array, teacher: Array, state: State, setting: Setting) -> float:
    student = _pooled(student) if teacher.ndim == 2 else student
    grams = [_unit(_rows(features) @ _rows(features).T) for features in (student, teacher)]
    return float(np.sum((grams[0] - grams[1]) ** 2) / len(student) ** 2)


def _smooth_l1(a: Array, b: Array) -> float:
    apart = np.abs(a - b)
    return float(np.mean(np.where(apart < 1, 0.5 * apart**2, apart - 0.5)))


def _rkd(distance: float, angle: float) -> Reference:
    def relations(features: Array) -> tuple[Array, Array]:
        """One pair and one triple after the other."""
        count = len(features)
        distances = np.array([[np.linalg.norm(a - b) for a in features] for b in features])
        if (distances > 0).any():
            distances /= distances[distances > 0].mean()
        angles = np.zeros((count, count, count))
        for i in range(count):
            for j in range(count):
                for k in range(count):
                    a, b = (_unit(features[other] - features[i]) for other in (j, k))
                    angles[i, j, k] = a @ b
        return distances, angles

    def reference(student: Array, teacher: Array, state: State, setting: Setting) -> float:
        (d_s, a_s), (d_t, a_t) = relations(_pooled(student)), relations(_pooled(teacher))
        return distance * _smooth_l1(d_s, d_t) + angle * _smooth_l1(a_s, a_t)

    return reference


def _pkt(student: Array, teacher: Array, state: State, setting: Setting) -> float:
    def probabilities(features: Array) -> Array:
        vectors = _unit(_pooled(features))
        affinities = (vectors @ vectors.T + 1) / 2
        return affinities / affinities.sum(axis=1, keepdims=True)

    p_s, p_t = probabilities(student), probabilities(teacher)
    return float(np.mean(p_t * np.log((p_t + 1e-7) / (p_s + 1e-7))))


def _cka(student: Array, teacher: Array, state: State, setting: Setting) -> float:
    x, y = (_pooled(features) - _pooled(features).mean(axis=0) for features in (student, teacher))
    norms = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    return float(1 - (np.linalg.norm(y.T @ x) ** 2 / norms if norms > 0 else 0.0))


def _srrl(student: Array, teacher: Array, state: State, setting: Setting) -> float:
    projected = _linear(state, "project.", _pooled(student))
    features = np.mean((projected - _pooled(teacher)) ** 2)
    weight, bias = (part.double().numpy() for part in _teacher_head(teacher.shape[1]))
    return float(features + np.mean((projected @ weight.T + bias - setting.logits) ** 2))


def _features_alone(student: Array, teacher: Array, state: State, setting: Setting) -> float:
    return float(np.mean((_linear(state, "project.", _pooled(student)) - _pooled(teacher)) ** 2))


def _crd(student: Array, teacher: Array, state: State, setting: Setting) -> float:
    """Equation 18 as it stands, with Z from this first batch, one row and one pair after the other."""
    count, temperature = 30, 0.07
    torch.manual_seed(SEED)
    others = torch.randint(NUM_IMAGES, (count,)).numpy()
    total = 0.0
    for side, features, bank in (("student", student, "seen_teacher"), ("teacher", teacher, "seen_student")):
        vectors = _unit(_linear(state, f"{side}.", _pooled(features)))
        kept = [[image, *others[others != image]] for image in setting.images]
        scores = [np.exp(v @ state[bank][where].T / temperature) for v, where in zip(vectors, kept, strict=True)]
        z = np.concatenate(scores).mean() * NUM_IMAGES
        noise = count / NUM_IMAGES
        for row in scores:
            p = row / z
            total -= np.log(p[0] / (p[0] + noise)) + np.sum(np.log(noise / (p[1:] + noise)))
    return total / len(student)


SEED = 5
TAP = {"student": "tap", "feature": "f"}
MAPS, WIDE, TOKENS, VECTOR = (4, 8, 8), (3, 4, 4), (17, 4), (4,)
TABLE = [
    Case(Hint(**TAP), MAPS, "maps", WIDE, _hint),
    Case(Hint(**TAP), (4, 4, 4), "maps", (3, 6, 7), _hint),
    Case(Hint(**TAP), MAPS, "pooled", (6,), _hint),
    Case(Hint(**TAP), TOKENS, "maps", (17, 6), _hint),
    Case(Hint(**TAP), TOKENS, "maps", WIDE, _hint),
    Case(Hint(**TAP), MAPS, "maps", (4, 6), _hint),
    Case(VID(**TAP), MAPS, "maps", WIDE, _vid),
    Case(VID(**TAP), TOKENS, "maps", (17, 6), _vid),
    Case(VID(**TAP), VECTOR, "pooled", (6,), _vid),
    Case(AttentionTransfer(**TAP), MAPS, "attention", (4, 4), _attention_transfer),
    Case(AttentionTransfer(**TAP), (4, 3, 3), "attention", (5, 5), _attention_transfer),
    Case(AttentionTransfer(**TAP), MAPS, "maps", WIDE, _attention_transfer),
    Case(AttentionTransfer(**TAP), TOKENS, "attention", (17,), _attention_transfer),
    Case(AttentionTransfer(**TAP), MAPS, "maps", TOKENS, _attention_transfer),
    Case(GradCAM(**TAP), MAPS, "grad_cam", (4, 4), _grad_cam),
    Case(GradCAM(**TAP), (4, 3, 3), "grad_cam", (5, 5), _grad_cam),
    Case(GradCAM(**TAP), TOKENS, "grad_cam", (17,), _grad_cam),
    Case(Similarity(**TAP), MAPS, "maps", WIDE, _similarity),
    Case(Similarity(**TAP), MAPS, "pooled", (6,), _similarity),
    Case(Similarity(**TAP), TOKENS, "maps", (10, 6), _similarity),
    Case(RKD(**TAP), MAPS, "pooled", (6,), _rkd(25.0, 50.0)),
    Case(RKD(**TAP, distance=constant(2.0), angle=constant(0.5)), VECTOR, "maps", WIDE, _rkd(2.0, 0.5)),
    Case(PKT(**TAP), MAPS, "pooled", (6,), _pkt),
    Case(PKT(**TAP), TOKENS, "maps", WIDE, _pkt),
    Case(CKA(**TAP), MAPS, "pooled", (6,), _cka),
    Case(CKA(**TAP), TOKENS, "maps", WIDE, _cka),
    Case(SRRL(**TAP), MAPS, "pooled", (6,), _srrl),
    Case(SRRL(**TAP), TOKENS, "maps", WIDE, _srrl),
    Case(SRRL(**TAP, logit_weight=constant(0.0)), VECTOR, "pooled", (6,), _features_alone),
    Case(CRD(**TAP, num_negatives=30, size=8), MAPS, "pooled", (6,), _crd),
    Case(CRD(**TAP, num_negatives=30, size=8), TOKENS, "maps", WIDE, _crd),
]
every_loss = pytest.mark.parametrize("case", TABLE, ids=lambda case: case.name)


def _random(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


HEAD = _random((CLASSES, 17), 1)


def _teacher_head(num_channels: int) -> tuple[Tensor, Tensor]:
    return _random((CLASSES, num_channels), 2), _random((CLASSES,), 3)


def _answer(features: Tensor) -> Targets:
    """A student whose logits are W · mean over places of f², so that their gradient is known."""
    squares = features.square()
    squares = squares.flatten(2) if features.ndim == 4 else squares.view(len(squares), -1, squares.shape[-1]).mT
    means = squares.mean(dim=2)
    return Targets(means @ HEAD[:, : means.shape[1]].to(means).T, {"tap": features})


def _signs(values: Tensor) -> Tensor:
    return torch.where(values > 0.3, 1e4, -1e4)


INPUTS: dict[str, tuple[int, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "random": (ROWS, lambda f: f, lambda f: f),
    "wide": (ROWS, lambda f: 40 * f, lambda f: 40 * f),
    "small": (ROWS, lambda f: 1e-3 * f, lambda f: f),
    "extreme": (ROWS, _signs, _signs),
    "extreme student": (ROWS, _signs, lambda f: f),
    "extreme teacher": (ROWS, lambda f: f, _signs),
    "one row": (1, lambda f: f, lambda f: f),
    "two rows": (2, lambda f: f, lambda f: f),
}
DEGENERATE: dict[str, tuple[int, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "silent student": (ROWS, torch.zeros_like, lambda f: f),
    "silent teacher": (ROWS, lambda f: f, torch.zeros_like),
    "silent": (ROWS, torch.zeros_like, torch.zeros_like),
    "all alike": (ROWS, lambda f: f[:1].expand_as(f), lambda f: f),
}


def _inputs(case: Case, name: str) -> tuple[Tensor, Tensor]:
    rows, of_student, of_teacher = (INPUTS | DEGENERATE)[name]
    student, teacher = of_student(_random((rows, *case.student), 7)), of_teacher(_random((rows, *case.teacher), 8))
    return student.clone(), teacher.square() if case.kind in ("attention", "grad_cam") else teacher


def _adapter(case: Case) -> nn.Module:
    torch.manual_seed(SEED)
    head = _teacher_head(case.teacher[-1] if len(case.teacher) == 2 else case.teacher[0])
    held = HeldTeacher(CLASSES, {"f": FeatureShape(case.kind, case.teacher)}, head)
    module: nn.Module = case.loss.adapter(Site({"tap": case.student}, {"t": held}, NUM_IMAGES))
    return module


def _setting(rows: int) -> Setting:
    logits = _random((rows, CLASSES), 9)
    labels = torch.arange(rows) * 2 % CLASSES
    labels[1::3] = -1
    classes = torch.where(labels < 0, logits.argmax(dim=1), labels)
    return Setting(classes.numpy(), logits.double().numpy(), (torch.arange(rows) * 7 % NUM_IMAGES).numpy())


def _batch(teacher: Tensor) -> Batch:
    rows = len(teacher)
    logits = _random((rows, CLASSES), 9)
    labels = torch.arange(rows) * 2 % CLASSES
    labels[1::3] = -1
    keys = torch.stack([torch.zeros(rows, dtype=torch.long), torch.arange(rows) * 7 % NUM_IMAGES], dim=1)
    images = torch.zeros(rows, 1, 1, 1, dtype=torch.uint8)
    return Batch(images, labels, keys, {"t": Targets(logits, {"f": teacher})})


def _value(case: Case, student: Tensor, teacher: Tensor, adapter: nn.Module | None = None) -> Tensor:
    adapter = _adapter(case) if adapter is None else adapter
    student = student if student.requires_grad else student.clone().requires_grad_()
    torch.manual_seed(SEED)
    value: Tensor = case.loss(_answer(student), _batch(teacher), Context(adapter, Progress(0, 1, 1)))
    return value


def _state(adapter: nn.Module) -> State:
    return {name: value.double().numpy().copy() for name, value in adapter.state_dict().items()}


def _expected(case: Case, student: Tensor, teacher: Tensor) -> float:
    setting = _setting(len(student))
    return case.reference(student.double().numpy(), teacher.double().numpy(), _state(_adapter(case)), setting)


def test_the_table_holds_every_loss_on_features() -> None:
    union = {loss for loss in get_args(get_args(Loss)[0]) if issubclass(loss, FeatureLoss)}
    assert {type(case.loss) for case in TABLE} == union


@every_loss
@pytest.mark.parametrize("name", INPUTS)
def test_a_loss_is_its_formula(case: Case, name: str) -> None:
    student, teacher = _inputs(case, name)
    value = _value(case, student, teacher)
    assert value.dtype == torch.float32
    assert value.shape == ()
    np.testing.assert_allclose(value.item(), _expected(case, student, teacher), rtol=1e-5, atol=1e-6)


@every_loss
@pytest.mark.parametrize("name", INPUTS | DEGENERATE)
def test_values_and_gradients_are_finite(case: Case, name: str) -> None:
    student, teacher = _inputs(case, name)
    adapter = _adapter(case)
    value = _value(case, student.requires_grad_(), teacher, adapter)
    value.backward()
    found = [student.grad, *(parameter.grad for parameter in adapter.parameters())]
    assert torch.isfinite(value)
    assert all(grad is not None and bool(torch.isfinite(grad).all()) for grad in found)
    assert all(float(grad.abs().max()) < 1e12 for grad in found if grad is not None)


@every_loss
@pytest.mark.parametrize("name", ["random", "one row"])
def test_the_gradient_is_that_of_the_value(case: Case, name: str) -> None:
    student, teacher = (features.double() for features in _inputs(case, name))
    adapter = _adapter(case).double().eval()
    _value(case, student, teacher, adapter)
    assert torch.autograd.gradcheck(
        lambda f: _value(case, f, teacher, adapter), student.requires_grad_(), fast_mode=True
    )
    for parameter in adapter.parameters():
        loss = _value(case, student.detach(), teacher, adapter)
        (grad,) = torch.autograd.grad(loss, parameter)
        step = 1e-6 * _random(tuple(parameter.shape), 11).double()
        with torch.no_grad():
            parameter += step
            above = _value(case, student.detach(), teacher, adapter)
            parameter -= 2 * step
            below = _value(case, student.detach(), teacher, adapter)
            parameter += step
        np.testing.assert_allclose((above - below).item() / 2, (grad * step).sum().item(), rtol=1e-4, atol=1e-12)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_arithmetic_is_float32_whatever_autocast_says(case: Case, dtype: torch.dtype) -> None:
    student, teacher = (features.to(dtype) for features in _inputs(case, "random"))
    if case.loss.differentiates:
        student = student.float()  # the student's own arithmetic is not the loss's
    with torch.autocast("cpu", torch.bfloat16, enabled=not case.loss.differentiates):
        value = _value(case, student, teacher)
    assert value.dtype == torch.float32
    np.testing.assert_allclose(value.item(), _value(case, student.float(), teacher.float()).item(), rtol=1e-6)
    np.testing.assert_allclose(value.item(), _expected(case, student, teacher), rtol=1e-5)


@pytest.mark.parametrize(
    "case", [case for case in TABLE if case.loss.by_row and case.loss.kind != "crd"], ids=lambda case: case.name
)
@pytest.mark.parametrize("size", [1, 4])
def test_the_parts_of_a_batch_sum_to_the_whole(case: Case, size: int) -> None:
    student, teacher = _inputs(case, "random")
    adapter, context = _adapter(case), Progress(0, 1, 1)
    whole = _batch(teacher)
    total = torch.zeros(())
    for start in range(0, ROWS, size):
        part = whole[slice(start, start + size)]
        outputs = _answer(student[start : start + size].requires_grad_())
        total += case.loss(outputs, part, Context(adapter, context)) * len(part) / ROWS
    np.testing.assert_allclose(total.item(), _value(case, student, teacher, adapter).item(), rtol=1e-5)


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (losses.hint, (6, 3, 4)),
        (losses.similarity, (6, 3, 4, 4)),
        (losses.rkd, (6, 5)),
        (losses.pkt, (6, 5)),
        (losses.cka, (6, 5)),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_student_with_the_teachers_features_has_no_loss_and_no_gradient(
    function: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...]
) -> None:
    teacher = _random(shape, 0)
    student = teacher.clone().requires_grad_()
    value = function(student, teacher)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert student.grad is not None
    assert student.grad.abs().max() <= 1e-5


def test_attention_and_grad_cam_forgive_scale() -> None:
    student = _random((6, 4, 4, 4), 0).requires_grad_()
    assert losses.attention_transfer(student, 3 * student.detach().square().mean(dim=1)).item() <= 1e-12
    answer = _answer(student)
    assert isinstance(answer.logits, Tensor)
    classes = torch.arange(6) % CLASSES
    slopes = 2 * HEAD[classes, :4, None, None] * student.detach() / 16
    wanted = torch.relu((slopes.mean(dim=(2, 3), keepdim=True) * student.detach()).sum(dim=1))
    value = losses.grad_cam(answer.logits, student, 5 * wanted, classes)
    value.backward()
    assert wanted.amax(dim=(1, 2)).count_nonzero() > 3
    assert value.item() <= 1e-12
    assert student.grad is not None
    assert student.grad.abs().max() <= 1e-5


def test_cka_forgives_rotation_and_scale() -> None:
    features = _random((9, 5), 0).double()
    rotation, _ = torch.linalg.qr(_random((5, 5), 1).double())
    assert losses.cka(3 * features @ rotation + 2, features).item() == pytest.approx(0, abs=1e-12)
    assert 0 < losses.cka(_random((9, 5), 2).double(), features).item() <= 1


def test_vid_is_smallest_where_the_mean_is_right() -> None:
    teacher, alpha = _random((6, 4, 3), 0), _random((3,), 1)
    mean = teacher.clone().requires_grad_()
    value = losses.vid(mean, alpha, teacher)
    value.backward()
    variance = np.logaddexp(0, alpha.double().numpy()) + 1e-5
    assert value.item() == pytest.approx(0.5 * np.log(variance).mean(), rel=1e-5)
    assert mean.grad is not None
    assert not mean.grad.any()


def test_vid_begins_with_a_variance_of_five() -> None:
    case = next(case for case in TABLE if case.loss.kind == "vid")
    alpha = _state(_adapter(case))["alpha"]
    np.testing.assert_allclose(np.logaddexp(0, alpha) + 1e-5, 5.0, rtol=1e-6)


def test_srrl_is_zero_for_the_teachers_own_features() -> None:
    weight, bias = _teacher_head(6)
    features = _random((ROWS, 6), 0)
    value = losses.softmax_regression(features, weight, bias, features @ weight.T + bias)
    assert value.item() == pytest.approx(0, abs=1e-12)


def test_features_alone_needs_neither_head_nor_logits() -> None:
    assert SRRL(**TAP).needs == {"head", "raw logits"}
    assert SRRL(**TAP, logit_weight=constant(0.0)).needs == frozenset()


def test_srrl_refuses_features_that_the_last_layer_does_not_take() -> None:
    held = HeldTeacher(CLASSES, {"f": FeatureShape("pooled", (6,))}, _teacher_head(8))
    with pytest.raises(RecipeError, match=r"'f' has 6 channels, the teacher's last layer takes 8\. Fix: .* fc:input"):
        SRRL(**TAP).adapter(Site({"tap": VECTOR}, {"t": held}, NUM_IMAGES))


# Contrastive distillation remembers.


def _crd_case(**changes: Any) -> tuple[Case, Any, Tensor, Tensor]:
    case = Case(CRD(**TAP, size=8, **changes), VECTOR, "pooled", (6,), _crd)
    student, teacher = _inputs(case, "random")
    return case, _adapter(case), student, teacher


def test_crd_moves_what_it_has_seen_by_its_momentum() -> None:
    case, memory, student, teacher = _crd_case(momentum=0.25)
    before = _state(memory)
    _value(case, student, teacher, memory)
    images = _setting(ROWS).images
    for side, features in (("student", student), ("teacher", teacher)):
        bank = before[f"seen_{side}"]
        vectors = _unit(_linear(before, f"{side}.", features.double().numpy()))
        bank[images] = _unit(0.25 * bank[images] + 0.75 * vectors)
        np.testing.assert_allclose(_state(memory)[f"seen_{side}"], bank, rtol=1e-5, atol=1e-7)


def test_crd_keeps_its_normalisation_from_the_first_batch() -> None:
    case, memory, student, teacher = _crd_case()
    _value(case, student, teacher, memory)
    offset = memory.offset.clone()
    assert torch.isfinite(offset).all()
    _value(case, 3 * student, teacher, memory)
    assert torch.equal(memory.offset, offset)


def test_crd_remembers_the_last_of_several_views_of_an_image() -> None:
    memory = losses.ContrastiveMemory(4, 6, NUM_IMAGES, size=8, momentum=0.0)
    student, teacher = _random((4, 4), 0), _random((4, 6), 1)
    memory(student, teacher, torch.tensor([3, 9, 3, 3]))
    vectors = torch.nn.functional.normalize(memory.student(student), dim=1)
    torch.testing.assert_close(memory.seen_student[[3, 9]], vectors[[3, 1]])


def test_crd_asks_for_no_more_negatives_than_there_are_other_images(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    randint = torch.randint

    def spy(high: int, size: tuple[int, ...], **options: Any) -> Tensor:
        drawn.append(size)
        return randint(high, size, **options)

    monkeypatch.setattr(torch, "randint", spy)
    case, memory, student, teacher = _crd_case()
    _value(case, student, teacher, memory)
    assert drawn == [(NUM_IMAGES - 1,)]


def test_crd_falls_as_the_students_embeddings_come_near_the_teachers() -> None:
    case, memory, student, teacher = _crd_case(num_negatives=20)
    optimizer = torch.optim.Adam(memory.parameters(), lr=0.02)
    values = []
    for _ in range(60):
        optimizer.zero_grad()
        value = _value(case, student, teacher, memory)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert min(values) > 0
    assert np.mean(values[-5:]) < 0.5 * values[0]
