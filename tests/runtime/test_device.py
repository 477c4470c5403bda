"""Devices: which are there, and how they are fed."""

import os
import sys

import pytest
import torch

from logitcache.errors import RecipeError
from logitcache.runtime.device import (
    autocast,
    grad_scaler,
    num_cores,
    own_randomness,
    pin,
    random_states,
    resolve_device,
    set_random_states,
    synchronize,
    to_device,
)

CPU = torch.device("cpu")


def test_cpu_is_always_there() -> None:
    assert resolve_device("cpu") == CPU


def test_auto_takes_an_accelerator_when_there_is_one() -> None:
    available = torch.cuda.is_available() or torch.backends.mps.is_available()
    assert (resolve_device("auto") != CPU) == available


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "meta", "cpu:1", "", "tpu:0"])
def test_an_unknown_device_is_refused_with_what_to_say(name: str) -> None:
    with pytest.raises(RecipeError, match="auto, cpu, cuda"):
        resolve_device(name)


def test_an_absent_device_is_refused_by_name() -> None:
    with pytest.raises(RecipeError, match=r"'cuda:99' is not available: this machine shows \d+"):
        resolve_device("cuda:99")


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="mps is there")
def test_absent_mps_is_refused() -> None:
    with pytest.raises(RecipeError, match="not available"):
        resolve_device("mps")


@pytest.mark.parametrize(("precision", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_autocast_computes_in_the_precision(precision: str, dtype: torch.dtype) -> None:
    with autocast(CPU, precision):  # type: ignore[arg-type]
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_gradients_are_scaled_in_float16_alone() -> None:
    assert grad_scaler(CPU, "float16").is_enabled()
    assert not grad_scaler(CPU, "bfloat16").is_enabled()
    assert not grad_scaler(CPU, "float32").is_enabled()


def test_a_copy_to_the_cpu_needs_no_pinning() -> None:
    tensor = torch.arange(4)
    assert pin(tensor, CPU) is tensor
    assert to_device(tensor, CPU) is tensor
    synchronize(CPU)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def _draw(device: torch.device) -> list[float]:
    return [*torch.rand(2).tolist(), *torch.rand(2, device=device).tolist()]


@pytest.mark.parametrize("name", DEVICES)
def test_own_randomness_depends_on_the_seed_alone_and_leaves_the_callers(name: str) -> None:
    device = resolve_device(name)
    set_aside = random_states(device)
    expected = _draw(device)
    set_random_states(device, set_aside)
    draws = []
    for seed in (7, 7, 8):
        with own_randomness(device, seed):
            draws.append(_draw(device))
    assert draws[0] == draws[1] != draws[2]
    assert _draw(device) == expected


def test_own_randomness_leaves_the_callers_after_an_error() -> None:
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), own_randomness(CPU, 1):
        _ = torch.rand(3).tolist()[0] / 0
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", DEVICES)
def test_a_random_state_is_taken_back(name: str) -> None:
    device = resolve_device(name)
    states = random_states(device)
    first = _draw(device)
    set_random_states(device, states)
    assert _draw(device) == first


def test_the_state_of_another_kind_of_device_is_left_out() -> None:
    states = random_states(CPU) | {"cuda": torch.zeros(16, dtype=torch.uint8)}
    first = _draw(CPU)
    set_random_states(CPU, states)
    assert _draw(CPU) == first


@pytest.mark.gpu
def test_a_copy_to_cuda_is_pinned_and_whole() -> None:
    device = resolve_device("cuda")
    tensor = torch.arange(1 << 20)
    assert pin(tensor, device).is_pinned()
    moved = to_device(tensor, device)
    synchronize(device)
    assert moved.device.type == "cuda"
    assert torch.equal(to_device(moved, CPU), tensor)


@pytest.mark.gpu
def test_autocast_in_float16_on_cuda() -> None:
    device = resolve_device("cuda")
    with autocast(device, "float16"):
        product = torch.ones(8, 8, device=device) @ torch.ones(8, 8, device=device)
    assert product.dtype == torch.float16
    assert grad_scaler(device, "float16").is_enabled()


def test_cores_are_counted_where_the_system_does_not_know_those_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert num_cores() == len(os.sched_getaffinity(0))
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert num_cores() == 8
