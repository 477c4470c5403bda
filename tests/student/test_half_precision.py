"""Every public loss function takes float16 and bfloat16 of student and teacher, and computes in float32."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from logitcache.student import losses
from logitcache.student.losses import ContrastiveMemory

LABELS = torch.tensor([0, 3, -1, 2])
HALVES = (torch.float16, torch.bfloat16)


class Call(NamedTuple):
    """A function of a student and a teacher, and their shapes."""

    function: Callable[[Tensor, Tensor], Tensor]
    student: tuple[int, ...]
    teacher: tuple[int, ...]


def _pair(function: Any, *rest: Any, shape: tuple[int, ...] = (4, 5), **options: Any) -> Call:
    return Call(lambda s, t: function(s, t, *rest, **options), shape, shape)


def _labelled(function: Any) -> Call:
    return Call(lambda s, t: function(s, t, LABELS[: len(s)]), (4, 5), (4, 5))


def _grad_cam(student: Tensor, teacher: Tensor) -> Tensor:
    return losses.grad_cam(student.mean(dim=(2, 3)), student, teacher, LABELS[: len(student)].clamp(min=0))


def _softmax_regression(student: Tensor, teacher: Tensor) -> Tensor:
    weight = torch.arange(-15, 15).view(5, 6) / 16
    return losses.softmax_regression(student, weight, torch.ones(5), teacher)


def _softmax_regression_of_half(student: Tensor, teacher: Tensor) -> Tensor:
    weight = (torch.arange(-15, 15).view(5, 6) / 16).to(teacher.dtype)
    return losses.softmax_regression(student, weight, torch.ones(5, dtype=teacher.dtype), teacher)


CALLS = {
    "attention_transfer": Call(losses.attention_transfer, (4, 6, 4, 4), (4, 2, 2)),
    "binary_cross_entropy": Call(lambda s, t: losses.binary_cross_entropy(s, (t > 0).int()), (4, 5), (4, 5)),
    "cka": _pair(losses.cka),
    "crd": Call(lambda s, t: losses.crd(s[:, 0], s, t[0, 0]), (4, 5), (4, 5)),
    "cross_entropy": Call(lambda s, t: losses.cross_entropy(s, LABELS[: len(s)], 0.1), (4, 5), (4, 5)),
    "dist": _pair(losses.dist),
    "dkd": _labelled(losses.dkd),
    "grad_cam": Call(_grad_cam, (4, 5, 4, 4), (4, 2, 2)),
    "hint": _pair(losses.hint),
    "kl_divergence": _pair(losses.kl_divergence, 3.0),
    "mean_squared_error": _pair(losses.mean_squared_error),
    "multi_label_kl": _pair(losses.multi_label_kl, 3.0),
    "nkd": _labelled(losses.nkd),
    "pkt": _pair(losses.pkt),
    "rkd": _pair(losses.rkd),
    "similarity": _pair(losses.similarity, shape=(4, 5, 2, 2)),
    "softmax_regression": Call(_softmax_regression, (4, 6), (4, 5)),
    "softmax_regression of a half bias": Call(_softmax_regression_of_half, (4, 6), (4, 5)),
    "standardize": Call(lambda s, t: losses.standardize(s).square().mean(), (4, 5), (4, 5)),
    "vid": Call(lambda s, t: losses.vid(s, t[0], t), (4, 5), (4, 5)),
    "wsld": _labelled(losses.wsld),
}


def test_the_table_holds_every_public_function() -> None:
    members = inspect.getmembers(losses, inspect.isfunction)
    functions = {name for name, value in members if value.__module__.startswith(losses.__name__)}
    assert {name.partition(" ")[0] for name in CALLS} == functions


def _inputs(call: Call) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(call.student, generator=generator), torch.rand(call.teacher, generator=generator) + 0.1


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("which", ["student", "teacher", "both"])
@pytest.mark.parametrize("name", CALLS)
def test_half_precision_gives_what_float32_gives(name: str, which: str, half: torch.dtype) -> None:
    """The same numbers, widened: no arithmetic in between may be of half precision, and gradients come back in it."""
    call = CALLS[name]
    student, teacher = (values.to(half) for values in _inputs(call))
    given = student if which != "teacher" else student.float()
    given = given.clone().requires_grad_()
    value = call.function(given, teacher if which != "student" else teacher.float())
    expected = call.function(student.float().requires_grad_(), teacher.float())
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
    value.backward()
    assert given.grad is not None
    assert given.grad.dtype == given.dtype
    assert given.grad.isfinite().all()


@contextmanager
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("half", HALVES)
def test_a_contrastive_memory_takes_half_precision(half: torch.dtype) -> None:
    def loss(dtype: torch.dtype) -> Tensor:
        with _seeded():
            memory: nn.Module = ContrastiveMemory(6, 5, 10, size=8, num_negatives=9)
            student, teacher = torch.randn(4, 6).to(half), torch.randn(4, 5).to(half)
            value: Tensor = memory(student.to(dtype), teacher.to(dtype), torch.arange(4))
        return value

    assert loss(half).dtype == torch.float32
    torch.testing.assert_close(loss(half), loss(torch.float32))


@pytest.mark.parametrize("name", CALLS)
def test_a_batch_of_one_row_trains_backwards(name: str) -> None:
    """One row may leave a loss nothing to compare; its value and its gradient are still numbers."""
    call = CALLS[name]
    student, teacher = (values[:1] for values in _inputs(call))
    given = student.clone().requires_grad_()
    value = call.function(given, teacher)
    value.backward()
    assert value.isfinite()
    assert given.grad is not None
    assert given.grad.isfinite().all()
