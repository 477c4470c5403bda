"""The versions that decide pixels and logits, for manifests and messages."""

import platform
from importlib.metadata import version

LIBRARIES = ("logitcache", "torch", "torchvision", "numpy", "pillow", "zarr", "numcodecs")


def versions() -> dict[str, str]:
    """Return library versions and the CPU's capability, such as `x86_64 AVX512`."""
    import torch

    cpu = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {name: version(name) for name in LIBRARIES} | {"python": platform.python_version(), "cpu": cpu}
