"""Devices: which are there, and how they are fed."""

import pytest
import torch

from logitcache.device import autocast, grad_scaler, pin, resolve_device, synchronize, to_device
from logitcache.errors import RecipeError

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
