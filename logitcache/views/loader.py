"""Render batches of views, ahead of their use and in worker processes."""

import atexit
import functools
import multiprocessing
import os
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from logitcache.errors import LogitCacheError
from logitcache.stopping import ignore_signals
from logitcache.views.handover import Handover
from logitcache.views.keys import ViewKey
from logitcache.views.spec import Views

StartMethod = Literal["fork", "spawn", "forkserver"]


class _Guarded:
    """Views whose errors are values: an exception would lose its type and gain a worker's traceback on its way."""

    def __init__(self, views: Views) -> None:
        self.views = views
        self._handover = Handover(views)

    def __reduce__(self) -> tuple[Callable[..., "_Guarded"], tuple[object, ...]]:
        """Share what is large in the views with the other workers."""
        return _Guarded, (self._handover,)

    def __getitems__(self, keys: list[ViewKey]) -> Tensor | LogitCacheError:
        try:
            return self.views.__getitems__(keys)
        except LogitCacheError as error:
            return error


class _Batches:
    """The batch sampler of persistent workers: what the main process asks for next."""

    def __init__(self) -> None:
        self.batches: Iterable[list[ViewKey]] = ()

    def __iter__(self) -> Iterator[list[ViewKey]]:
        return iter(self.batches)


def _same(rendered: Tensor | LogitCacheError) -> Tensor | LogitCacheError:
    return rendered


def _start_worker(ending: Connection, worker: int) -> None:
    """Leave signals to the main process, and end with it or at its word.

    torch alone leaves workers behind: those of a forkserver when the main process is killed, and any when a loader is
    garbage in a cycle, as one in the traceback of an error is; they would then be waited for at exit, forever.
    """
    ignore_signals()
    # What the user's code prints must not mix with the result on standard output.
    sys.stdout = sys.stderr
    os.dup2(2, 1)
    threading.Thread(target=_await_end, args=(ending,), daemon=True).start()


def _await_end(ending: Connection) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel, ending])
    os._exit(0)


def _end_workers(ending: Connection | None, owner: int) -> None:
    """Tell every worker, as none takes the message; a fork of the process has a copy of the loader, but no say."""
    if ending is not None and os.getpid() == owner:
        ending.send_bytes(b"end")


class ViewLoader:
    """Render batches of keys with `num_workers` processes (0: in this one), `prefetch` batches ahead in each."""

    def __init__(
        self, views: Views, num_workers: int = 0, start_method: StartMethod = "forkserver", prefetch: int = 2
    ) -> None:
        options: dict[str, Any] = {}
        told = None
        if num_workers:
            context = multiprocessing.get_context(start_method)
            if start_method == "forkserver":
                context.set_forkserver_preload([__name__])  # torch is imported once, not once a worker
            heard, told = context.Pipe(duplex=False)
            options = {
                "multiprocessing_context": context,
                "prefetch_factor": prefetch,
                "persistent_workers": True,
                "worker_init_fn": functools.partial(_start_worker, heard),
            }
        self._images = _outliving_workers([], 0)
        self._sampler = _Batches()
        with warnings.catch_warnings():
            # How many workers pay is for the user to say: many of them wait for disks.
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            self._loader: DataLoader[Tensor | LogitCacheError] | None = DataLoader(
                _Guarded(views),  # type: ignore[arg-type]  # only `__getitems__` is used
                batch_sampler=self._sampler,  # of any length
                collate_fn=_same,  # type: ignore[arg-type]  # a rendered batch, not a list of samples
                num_workers=num_workers,
                generator=torch.Generator(),  # or torch would draw the workers' seeds from the global one
                **options,
            )
        self._end = weakref.finalize(self, _end_workers, told, os.getpid())
        self._end.atexit = False  # it might be too late
        _open.add(self)

    def render(self, batches: Iterable[list[ViewKey]]) -> Iterator[Tensor]:
        """Yield one uint8 [B, C, H, W] per batch of keys; raise DataError where an image cannot be read.

        The workers serve one call at a time: a later call ends this one, with RuntimeError if it is continued.
        """
        assert self._loader is not None, "closed"
        self._images.close()
        self._images = images = _outliving_workers(self._loader, self._loader.num_workers)
        self._sampler.batches = batches
        for rendered in images:
            if isinstance(rendered, LogitCacheError):
                raise rendered
            yield rendered
        if images is not self._images:
            raise RuntimeError("another epoch was started from the same loader; one loader serves one at a time")

    def close(self) -> None:
        """End the workers; nothing can be rendered afterwards."""
        self._images.close()
        self._end()
        self._loader = None


_open: weakref.WeakSet[ViewLoader] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """End all workers: a process that exits sends its children SIGTERM, which they ignore, and waits for them."""
    for loader in list(_open):
        loader.close()


def _outliving_workers(
    loader: Iterable[Tensor | LogitCacheError], num_workers: int
) -> Generator[Tensor | LogitCacheError, None, None]:
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):
            raise
        raise _killed(error) from error
    except (ConnectionError, EOFError) as error:
        # Pixels are fetched from the worker that announced them; errors of the data set say where they come from.
        if not num_workers or "in DataLoader worker process" in str(error):
            raise
        raise _killed(_noticed(error)) from error


def _noticed(error: Exception) -> Exception:
    """Wait until torch notices the worker's death: it raises wherever the main process is by then."""
    try:
        time.sleep(1)
    except RuntimeError as death:
        return death
    return error


def _killed(error: Exception) -> LogitCacheError:
    return LogitCacheError(
        f"a process that renders views was killed or could not start ({error}).\n"
        "  Fix: fewer workers or a smaller batch, as memory or /dev/shm may have run out; a script of your own "
        "needs `if __name__ == '__main__':` around what it runs"
    )
