"""What a worker of a cluster runs: a function that is opened once in its process, and applied to one item at a time."""

import contextlib
import os
import pickle
import platform
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from logitcache.errors import KilledWorkerError, LogitCacheError, rebuilt
from logitcache.runtime.stopping import ignore_signals

Opener = Callable[[], AbstractContextManager[Callable[[Any], Any]]]
"""Opens a function in a worker, with what it keeps between calls. It can be pickled."""


_calling = threading.Lock()
"""Held during a call: a worker of several threads has one device all the same."""

_opened: dict[str, Callable[[Any], Any]] = {}
"""At most one function, by name."""

_held = contextlib.ExitStack()


def call(name: str, opener: bytes, threads: int | None, item: Any) -> Any:
    """Apply a function to an item, with so many threads of torch; `opener` is a pickled Opener, opened once by name.

    A user's error is returned, so that Dask does not retry it.
    """
    with _calling:
        try:
            if name not in _opened:
                _close()
                if threads is not None:
                    torch.set_num_threads(threads)
                _opened[name] = _held.enter_context(pickle.loads(opener)())
            return _opened[name](item)
        except KilledWorkerError:
            _close()
            raise  # Dask retries it: other processes render the images then
        except LogitCacheError as error:
            return located(error)
        except BaseException:
            _close()  # what failed in an unknown way may be unusable
            raise


def located(error: LogitCacheError) -> LogitCacheError:
    """Add to an error where it was raised: the worker as Dask names it, its host and its process."""
    return rebuilt(type(error), f"{error}\n  On worker: {_worker()}{platform.node()}, process {os.getpid()}")


def _worker() -> str:
    from distributed import get_worker

    try:
        worker = get_worker()
    except ValueError:  # in no worker
        return ""
    return f"{worker.name} at {worker.address}, " if worker.name != worker.address else f"{worker.address}, "


def release(name: str) -> None:
    """Close a function, unless it is in use."""
    if name in _opened and _calling.acquire(blocking=False):
        try:
            _close()
        finally:
            _calling.release()


def _close() -> None:
    _opened.clear()
    _held.close()


def dask_setup(worker: object) -> None:
    """Leave signals to the client, which ends the workers that it started; Dask calls this in a worker's process."""
    ignore_signals()
