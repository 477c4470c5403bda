"""The versions that decide pixels and logits, for manifests and messages."""

import platform
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

LIBRARIES = ("logitcache", "torch", "torchvision", "numpy", "pillow", "zarr", "numcodecs")


def versions() -> dict[str, str]:
    """Return library versions and the CPU's capability, such as `x86_64 AVX512`."""
    return dict(_versions())


@cache  # each takes the parsing of a file
def _versions() -> dict[str, str]:
    import torch
    from PIL import features

    jpeg = features.version("libjpeg_turbo")
    cpu = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {name: version(name) for name in LIBRARIES} | {
        # Its releases may decode JPEG differently; a Pillow without the turbo variant has the plain one.
        "libjpeg": f"turbo {jpeg}" if jpeg else str(features.version("jpg")),
        "python": platform.python_version(),
        "cpu": cpu,
    }


def machine_of(device: "torch.device") -> dict[str, str]:
    """Return what decides how a network rounds on a device: torch, the CPU's capability, and the device's name."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {key: versions()[key] for key in ("torch", "cpu")} | {"device": name}
