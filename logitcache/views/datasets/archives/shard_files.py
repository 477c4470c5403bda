"""Shard files: archives on this machine or at a URL, read through once, and piece by piece from then on."""

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from logitcache.store import digest_index
from logitcache.store.remote.client import PART, Entry, Remote, is_remote
from logitcache.store.safe_files import open_regular, require_regular
from logitcache.views.datasets.archives.tar_members import Readable

_AHEAD = 3  # parts of a remote file that are fetched before they are used

T = TypeVar("T")

R = TypeVar("R")


class LocalTarShard:
    """An archive on this machine. OSError is raised if it cannot be read, RefusedError if it is no regular file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __str__(self) -> str:
        return str(self._path)

    def entry(self) -> Entry:
        """Return the size, and what changes with the content; nothing of a file that changed just now."""
        status = os.stat(self._path)
        require_regular(self._path, status)
        stamp = digest_index.stamp(status)
        return Entry(stamp[0], str(stamp) if digest_index.settled(stamp, digest_index.now_ns()) else "")

    @contextlib.contextmanager
    def opened(self, size: int) -> Iterator[Readable]:
        """Read it from start to end."""
        with open_regular(self._path) as file:
            yield file

    def piece(self, start: int, stop: int) -> bytes:
        """Return the bytes start..stop, fewer if it ends before."""
        with open_regular(self._path) as file:
            return os.pread(file.fileno(), stop - start, start)

    def each(self, function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
        """Yield what a function that takes pieces returns for each item, in order."""
        return map(function, items)


class RemoteTarShard:
    """An archive at a URL. RemoteError or FileNotFoundError is raised if it cannot be read."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote

    def __str__(self) -> str:
        return str(self._remote)

    def entry(self) -> Entry:
        """Return the size, and what changes with the content, if the storage has that."""
        return self._remote.entry()

    @contextlib.contextmanager
    def opened(self, size: int) -> Iterator[Readable]:
        """Read it from start to end, the next parts while one is used."""
        with ThreadPoolExecutor(_AHEAD, thread_name_prefix="logitcache-ahead") as pool:
            ahead = _Ahead(self._remote, size, pool)
            try:
                yield ahead
            finally:
                pool.shutdown(cancel_futures=True)

    def piece(self, start: int, stop: int) -> bytes:
        """Return the bytes start..stop."""
        return self._remote.read_range("", start, stop)

    def each(self, function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
        """Yield what a function that takes pieces returns for each item, in order; some run at the same time."""
        return self._remote.each(function, items)


TarShard = LocalTarShard | RemoteTarShard


def shard_at(location: str) -> TarShard:
    """Return the archive at a path or a URL."""
    if is_remote(location):
        return RemoteTarShard(Remote(location))
    return LocalTarShard(Path(location).expanduser().absolute())


class _Ahead:
    """The bytes of a remote file in order."""

    def __init__(self, remote: Remote, size: int, pool: ThreadPoolExecutor) -> None:
        self._parts = (
            pool.submit(remote.read_range, "", start, min(start + PART, size)) for start in range(0, size, PART)
        )
        self._coming: deque[Future[bytes]] = deque()
        self._here = memoryview(b"")
        for _ in range(_AHEAD):
            self._ask()

    def read(self, count: int, /) -> bytes:
        """Return so many bytes, fewer at the end."""
        pieces = []
        while count and (self._here or self._coming):
            if not self._here:
                self._here = memoryview(self._coming.popleft().result())
                self._ask()
            pieces.append(self._here[:count])
            self._here = self._here[count:]
            count -= len(pieces[-1])
        return b"".join(pieces)

    def seek(self, offset: int, whence: int, /) -> int:
        """Pass over bytes that are not wanted: the parts that hold them are fetched all the same."""
        assert whence == os.SEEK_CUR, "only forwards, from here"
        while offset and (passed := len(self.read(min(offset, PART)))):
            offset -= passed
        return 0

    def _ask(self) -> None:
        part = next(self._parts, None)
        if part is not None:
            self._coming.append(part)
