"""Render batches of views, ahead of their use and in worker processes."""

import atexit
import functools
import multiprocessing
import os
import signal
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext, ForkServerProcess
from multiprocessing.process import BaseProcess
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from logitcache.errors import KilledWorkerError, LogitCacheError
from logitcache.runtime.main_guard import require_main_guard
from logitcache.runtime.stopping import ignore_signals
from logitcache.store.shared_memory import leave
from logitcache.views.decoded_once import decoded_once
from logitcache.views.keys import ViewKey
from logitcache.views.shared_arrays import SharedArrays
from logitcache.views.spec import Views

StartMethod = Literal["fork", "spawn", "forkserver"]

_PRELOADED = (__name__, "torchvision.transforms.v2")

_ENDING = 5.0
"""Seconds that a worker may take to end after its connections are closed."""

_NO_SERVER = 255
"""Exit code that multiprocessing gives the processes of a forkserver that was killed: SIGTERM to a job kills it."""


class _Copied(NamedTuple):
    """A batch that is sent through a pipe, as shared memory refused it, and why."""

    images: NDArray[np.uint8]
    why: str


Rendered = Tensor | _Copied | LogitCacheError


class _Renderer:
    """Views whose errors are values: an exception would lose its type and gain a worker's traceback on its way."""

    def __init__(self, views: Views) -> None:
        self.views = views
        self._shared = SharedArrays(views)

    def __reduce__(self) -> tuple[Callable[..., "_Renderer"], tuple[object, ...]]:
        """Share the large arrays of the views with the other workers."""
        return _Renderer, (self._shared,)

    def __getitems__(self, keys: Sequence[ViewKey]) -> Rendered:
        """Render a batch; a worker moves it to shared memory.

        Left to torch, a thread of the worker does that, where an error drops the batch, which is awaited for ever.
        """
        try:
            images = self.views.__getitems__(keys)
        except LogitCacheError as error:
            return error
        if get_worker_info() is not None:
            try:
                images.share_memory_()  # type: ignore[no-untyped-call]
            except RuntimeError as refused:
                return _Copied(images.numpy(), str(refused))
        return images


class _Batches:
    """The batch sampler of persistent workers: the keys that the main process asks for next."""

    def __init__(self) -> None:
        self.batches: Iterable[Sequence[ViewKey]] = ()

    def __iter__(self) -> Iterator[Sequence[ViewKey]]:
        return iter(self.batches)


def _as_it_is(rendered: Rendered) -> Rendered:
    return rendered


def _recording(start_method: StartMethod, workers: list[BaseProcess]) -> BaseContext:
    """Return a context of multiprocessing that adds each process it makes to `workers`."""
    context = type(multiprocessing.get_context(start_method))()
    make = context.Process  # type: ignore[attr-defined]

    def process(*args: Any, **options: Any) -> BaseProcess:
        workers.append(made := make(*args, **options))
        return made  # type: ignore[no-any-return]

    context.Process = process  # type: ignore[attr-defined]
    return context


def _start_worker(end: Connection, worker: int) -> None:
    """Leave signals to the main process; end with it, or if it sends a message.

    torch alone leaves workers behind: those of a forkserver when the main process is killed, and any when a loader is
    garbage in a cycle, as one in the traceback of an error is; they would then be waited for at exit, forever.
    """
    ignore_signals()
    # What the user's code prints must not mix with the result on standard output.
    sys.stdout = sys.stderr
    os.dup2(2, 1)
    threading.Thread(target=_await_end, args=(end,), daemon=True).start()


def _await_end(end: Connection) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    if parent.sentinel in wait([parent.sentinel, end]):
        leave()  # nobody else may be left to
    os._exit(0)


def _end_workers(end: Connection | None, owner: int) -> None:
    """End every worker by a message that none receives; the copy of a loader in a forked process ends none."""
    if end is not None and os.getpid() == owner:
        end.send_bytes(b"end")


class ViewLoader:
    """Render batches of keys with `num_workers` processes (0: in this one), `prefetch` batches ahead in each."""

    together: ClassVar[int] = 0
    """Bytes of batches that are worth making together: none, as workers render batch by batch."""

    def __init__(
        self, views: Views, num_workers: int = 0, start_method: StartMethod = "forkserver", prefetch: int = 2
    ) -> None:
        options: dict[str, Any] = {}
        end = None
        self._workers: list[BaseProcess] = []
        if num_workers:
            if start_method != "fork":
                require_main_guard(f"num_workers {num_workers}")
            context = _recording(start_method, self._workers)
            if start_method == "forkserver":
                # Torch, and torchvision if views need it, are imported once, not once a worker.
                context.set_forkserver_preload([name for name in _PRELOADED if name in sys.modules])
            end_of_workers, end = context.Pipe(duplex=False)
            options = {
                "multiprocessing_context": context,
                "prefetch_factor": prefetch,
                "persistent_workers": True,
                "worker_init_fn": functools.partial(_start_worker, end_of_workers),
            }
        self._images = _outliving_workers([], [], 0)
        self._sampler, self._has_copied = _Batches(), False
        with warnings.catch_warnings():
            # The user decides how many workers pay: many of them wait for disks.
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            self._loader: DataLoader[Rendered] | None = DataLoader(
                _Renderer(decoded_once(views)),  # type: ignore[arg-type]  # only `__getitems__` is used
                batch_sampler=self._sampler,  # type: ignore[arg-type]  # of any length, of any sequences
                collate_fn=_as_it_is,  # type: ignore[arg-type]  # a rendered batch, not a list of samples
                num_workers=num_workers,
                generator=torch.Generator(),  # or torch would draw the workers' seeds from the global one
                **options,
            )
        self._end = weakref.finalize(self, _end_workers, end, os.getpid())
        self._end.atexit = False  # it might be too late
        _open.add(self)

    def render(self, batches: Iterable[Sequence[ViewKey]]) -> Iterator[Tensor]:
        """Yield one uint8 [B, C, H, W] per batch of keys; raise DataError if an image cannot be read.

        The workers serve one call at a time: a later call ends this one, with RuntimeError if it is continued.
        """
        assert self._loader is not None, "closed"
        self._images.close()
        self._images = images = _outliving_workers(self._loader, self._workers, self._loader.num_workers)
        self._sampler.batches = batches
        for rendered in images:
            if isinstance(rendered, LogitCacheError):
                raise rendered
            if isinstance(rendered, _Copied):
                if not self._has_copied:
                    warnings.warn(
                        f"shared memory refuses rendered images, which come through a pipe, more slowly: {rendered.why}"
                        ". Fix: a larger /dev/shm (a container's: docker run --shm-size 2g), a smaller batch_size or "
                        "fewer num_workers",
                        stacklevel=2,
                    )
                self._has_copied, rendered = True, torch.from_numpy(rendered.images)
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
    loader: Iterable[Rendered], workers: Sequence[BaseProcess], num_workers: int
) -> Generator[Rendered, None, None]:
    """Yield what a loader renders; an error that comes of a worker's end is raised as what ended it."""
    try:
        yield from _started(loader)
    except (RuntimeError, OSError, EOFError) as error:
        # Pixels are fetched from the worker that announced them, and its connections end a little before it does;
        # torch's own errors name an ended worker, or the data set's error.
        is_certain = isinstance(error, RuntimeError) or "in DataLoader worker process" in str(error)
        ended = _ended(workers, 0.0 if is_certain else _ENDING)
        if ended is not None and ended < 0:
            raise KilledWorkerError(
                f"a process that renders views was killed by {signal.Signals(-ended).name}, by the system if nobody "
                "else: memory may have run out.\n"
                "  Fix: the same command continues; fewer num_workers or a smaller batch_size take less memory"
            ) from error
        if ended == _NO_SERVER and any(isinstance(worker, ForkServerProcess) for worker in workers):
            raise KilledWorkerError(
                "the process that starts those that render views was killed, by a signal to all processes of this job "
                "if nobody else.\n  Fix: the same command continues"
            ) from error
        if ended is not None:
            raise LogitCacheError(
                f"a process that renders views ended with exit code {ended}; what it printed is above.\n"
                "  Fix: a script of your own needs `if __name__ == '__main__':` around what it runs; a data set of "
                "your own must not end the process"
            ) from error
        if sum(worker.pid is not None for worker in workers) < num_workers and isinstance(error, OSError):
            raise LogitCacheError(
                f"the processes that render views cannot start: {error.strerror or error}.\n"
                "  Fix: num_workers: 0 renders without them; else a larger /dev/shm, which holds their semaphores, or "
                "a higher limit of processes"
            ) from error
        raise


def _started(loader: Iterable[Rendered]) -> Iterator[Rendered]:
    """Start an epoch without torch's handler of SIGCHLD, which raises wherever the main process is as a worker ends.

    Torch looks every few seconds as well, while a batch is awaited.
    """
    before = signal.getsignal(signal.SIGCHLD)
    images = iter(loader)
    if before is not None and before != signal.getsignal(signal.SIGCHLD):
        signal.signal(signal.SIGCHLD, before)
    return images


def _ended(workers: Sequence[BaseProcess], seconds: float) -> int | None:
    """Return the exit code of a worker that has ended, or does within some seconds; None if all live."""
    started = {worker.sentinel: worker for worker in workers if worker.pid is not None}
    for sentinel in wait(list(started), seconds) if started else ():
        assert isinstance(sentinel, int)
        started[sentinel].join(_ENDING)
    return next((worker.exitcode for worker in started.values() if worker.exitcode is not None), None)
