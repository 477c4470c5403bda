"""The versions that decide pixels and logits, for manifests and messages."""

import platform
from functools import cache
from importlib.metadata import version

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
