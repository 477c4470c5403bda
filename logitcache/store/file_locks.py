"""Files that several processes of a machine make once: whoever comes first writes, the others wait and find them.

A file is written beside its place, under a lock that ends with its process, and renamed when it is whole.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PART = ".part"
"""How the name ends of what is being written."""


class Part:
    """What a file is written to, while it is locked."""

    def __init__(self, file: Path, descriptor: int) -> None:
        self._file, self._descriptor = file, descriptor

    def finish(self, data: bytes | memoryview) -> None:
        """Write the bytes of the file, which then is there."""
        os.ftruncate(self._descriptor, 0)
        left = memoryview(data).cast("B")
        while left:
            left = left[os.write(self._descriptor, left) :]
        _path(self._file).rename(self._file)

    def close(self) -> None:
        """Let others go on; what was not finished is removed."""
        with suppress(OSError):
            _remove_if_at(self._descriptor, _path(self._file))
        os.close(self._descriptor)


@contextmanager
def locked_part(file: Path) -> Iterator[Part]:
    """Open what a file is written to, once nobody else has it; whoever waited should look for the file first."""
    while True:
        part = os.open(_path(file), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(part, fcntl.LOCK_EX)
        except BaseException:
            os.close(part)
            raise
        # Another may have renamed or removed it before it was locked here: then look again.
        if is_at(part, _path(file)):
            break
        os.close(part)
    opened = Part(file, part)
    try:
        yield opened
    finally:
        opened.close()


def remove_abandoned(part: Path) -> None:
    """Remove a file that no living process is writing."""
    descriptor = os.open(part, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove_if_at(descriptor, part)
    except BlockingIOError:
        pass
    finally:
        os.close(descriptor)


def _path(file: Path) -> Path:
    return file.with_name(file.name + PART)


def is_at(descriptor: int, path: Path) -> bool:
    """Whether what is open is still what lies at a path."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def _remove_if_at(descriptor: int, path: Path) -> None:
    if is_at(descriptor, path):
        path.unlink()
