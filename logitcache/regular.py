"""Regular files: opened without waiting, as a FIFO or a device that a file names might never answer."""

import os
import stat
from pathlib import Path
from typing import BinaryIO

from logitcache.errors import RefusedError


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file for reading. Raises RefusedError for a device, a FIFO or a socket, without waiting for it."""
    require_regular(path, os.stat(path))  # opening a device may already do something
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115  # the caller closes it
    try:
        require_regular(path, os.fstat(file.fileno()))
    except BaseException:
        file.close()
        raise
    return file


def require_regular(path: str | Path, status: os.stat_result) -> None:
    """Raise RefusedError unless a path leads to a regular file; a folder is left to `open`, which names it."""
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise RefusedError(
            f"'{path}' is a FIFO, a device or a socket, not a regular file: reading it might never end.\n"
            "  Fix: name a regular file, or remove it."
        )
