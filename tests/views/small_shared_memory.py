"""Render with worker processes that have little shared memory: a program of a mount namespace of its own.

    unshare -m python -m tests.views.small_shared_memory

Exits 77 if no tmpfs can be mounted; else prints, as JSON by size, whether the images are those of one process, the
warnings, the error if there was one, and the seconds that it all took.
"""

import json
import subprocess
import sys
import time
import warnings
from typing import Any

import torch

from logitcache.errors import LogitCacheError
from logitcache.views.keys import ViewKey
from logitcache.views.loader import StartMethod, ViewLoader
from logitcache.views.spec import Views, ViewSpec
from tests.views.images import Images, textured

SIDE, BATCH, BATCHES = 96, 8, 6
SIZES: dict[str, StartMethod] = {"4k": "fork", "64k": "forkserver", "160k": "fork"}


class Arrays(Images):
    """The same as NumPy arrays: tensors would have to be shared before anything is rendered."""

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "pixels": [image.numpy() for image in self.pixels]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({**state, "pixels": list(map(torch.from_numpy, state["pixels"]))})


def rendered(start_method: StartMethod) -> dict[str, Any]:
    views = Views(Arrays(textured(BATCH * BATCHES, SIDE, SIDE)), ViewSpec())
    batches = [[ViewKey(0, start + index) for index in range(BATCH)] for start in range(0, BATCH * BATCHES, BATCH)]
    expected = list(ViewLoader(views).render(batches))
    started = time.perf_counter()
    found: dict[str, Any] = {"error": None, "identical": False}
    loader = ViewLoader(views, 2, start_method)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            for _ in range(2):  # an epoch, and another by the same workers
                found["identical"] = all(map(torch.equal, loader.render(batches), expected))
        except LogitCacheError as error:
            found |= {"error": str(error), "exit_code": error.exit_code}
        finally:
            loader.close()
    return found | {"warnings": [str(w.message) for w in caught], "seconds": time.perf_counter() - started}


def mounted(size: str) -> bool:
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", "/dev/shm"]
    return subprocess.run(mount, capture_output=True, check=False).returncode == 0


def main() -> dict[str, Any] | None:
    found = {}
    for size, start_method in SIZES.items():
        if not mounted(size):
            return None
        found[size] = rendered(start_method)
    return found


if __name__ == "__main__":
    found = main()
    if found is None:
        sys.exit(77)
    print(json.dumps(found))
