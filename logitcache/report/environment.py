"""What a result was made with: versions and devices, nothing that names a person or a machine."""

import os
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

    return {
        "logitcache": logitcache.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "libraries": {name: _version(name) for name in LIBRARIES},
        "cpu": {
            "capability": torch.backends.cpu.get_cpu_capability(),
            "cores": len(os.sched_getaffinity(0)) if _HAS_AFFINITY else os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "cuda": torch.version.cuda,
        "devices": [_gpu(index) for index in range(torch.cuda.device_count())],
        "mps": torch.backends.mps.is_available(),
    }


# macOS and Windows cannot tell which cores a process may use.
_HAS_AFFINITY = "sched_getaffinity" in dir(os)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _gpu(index: int) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
    }
