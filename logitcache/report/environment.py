"""Describe the environment of a result: versions and devices, nothing that names a person or a machine."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

LIBRARIES = (
    "torch",
    "torchvision",
    "zarr",
    "numcodecs",
    "numpy",
    "Pillow",
    "safetensors",
    "pydantic",
    "dask",
    "timm",
)


def environment() -> dict[str, Any]:
    """Collect versions, platform and devices for JSON; None for what is not installed."""
    import torch

    import logitcache
    from logitcache.runtime.device import num_cores

    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "logitcache": logitcache.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "libraries": {name: _version(name) for name in LIBRARIES},
        "cpu": {
            "capability": torch.backends.cpu.get_cpu_capability(),
            "cores": num_cores(),
            "threads": torch.get_num_threads(),
        },
        "cuda": torch.version.cuda,
        "devices": [
            {"name": gpu.name, "memory_bytes": gpu.total_memory, "capability": f"{gpu.major}.{gpu.minor}"}
            for gpu in devices
        ],
        "mps": torch.backends.mps.is_available(),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
