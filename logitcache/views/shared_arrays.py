"""Shared arrays: worker processes map the large arrays of a value from one file, in place of a copy each."""

import contextlib
import io
import mmap
import pickle
import tempfile
import weakref
from collections.abc import Callable, Sequence
from multiprocessing.reduction import DupFd, ForkingPickler
from typing import IO, Any

from logitcache.errors import LogitCacheError
from logitcache.store.files import fix_of

_LARGE = 1 << 20  # bytes of an array that is shared
_ALIGNED = 64  # bytes that arrays begin at multiples of


class SharedArrays:
    """A value for processes that are being started on this machine.

    NumPy arrays of a MiB or more, wherever in it they are, share their memory among these processes until one of them
    is written to; a process that writes gets a copy of the pages that it writes to. Tensors are shared as torch does.
    """

    def __init__(self, value: object) -> None:
        self._value = value
        self._file: IO[bytes] | None = None

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        """Pickle the value for one process; the arrays are written for the first of them only."""
        buffers: list[memoryview] = []

        def stays(buffer: pickle.PickleBuffer) -> bool:
            found = buffer.raw()
            if found.nbytes >= _LARGE:
                buffers.append(found)
            return found.nbytes < _LARGE

        stream = io.BytesIO()
        try:
            ForkingPickler(stream, 5, True, stays).dump(self._value)
        except RuntimeError as cause:
            if "shared memory" not in str(cause):
                raise
            raise LogitCacheError(
                f"the tensors of the data set do not fit in shared memory, where worker processes read them: {cause}.\n"
                "  Fix: num_workers: 0, a larger /dev/shm (a container's: docker run --shm-size 2g), or NumPy arrays"
            ) from cause
        if not buffers:
            return pickle.loads, (stream.getvalue(),)
        if self._file is None:
            self._file = _written(buffers)
            weakref.finalize(self, self._file.close)
        return _received, (stream.getvalue(), DupFd(self._file.fileno()), [buffer.nbytes for buffer in buffers])


def _written(buffers: Sequence[memoryview]) -> IO[bytes]:
    """Write buffers to a file without a name, so that nothing of it is left when all processes have ended."""
    starts = _starts([buffer.nbytes for buffer in buffers])
    try:
        with contextlib.ExitStack() as unless_written:
            file = unless_written.enter_context(tempfile.TemporaryFile(buffering=0))
            for buffer, start in zip(buffers, starts, strict=True):
                file.seek(start)
                while buffer:
                    buffer = buffer[file.write(buffer) :]  # the system takes 2 GiB at a time
            unless_written.pop_all()
        return file
    except OSError as cause:
        raise LogitCacheError(
            f"{sum(buffer.nbytes for buffer in buffers)} bytes of the data set, which worker processes share, cannot "
            f"be written below '{tempfile.gettempdir()}': {cause.strerror or cause}.\n"
            f"  Fix: {fix_of(cause) or 'remove the cause'}; or set TMPDIR to another folder, or num_workers: 0"
        ) from cause


def _starts(sizes: Sequence[int]) -> list[int]:
    starts = [0]
    for size in sizes[:-1]:
        starts.append(-(-(starts[-1] + size) // _ALIGNED) * _ALIGNED)
    return starts


def _received(pickled: bytes, file: Any, sizes: Sequence[int]) -> object:
    with open(file.detach(), "rb") as opened:
        mapped = memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY))
    places = zip(_starts(sizes), sizes, strict=True)
    return pickle.loads(pickled, buffers=[mapped[start : start + size] for start, size in places])
