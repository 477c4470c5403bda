"""Turns: of the processes of a machine that would read the same from afar, one does, and the others find it kept."""

import contextlib
import fcntl
import os
import threading
from collections.abc import Iterator
from pathlib import Path

_LOOK = 0.1  # seconds between two looks at whether it is one's turn


@contextlib.contextmanager
def turn(kept_at: Path | None, given_up: threading.Event) -> Iterator[None]:
    """Wait for whoever is about to keep something at a path, or until `given_up` is set.

    It only saves work: where nothing is kept, or the file system has no locks, nobody waits.
    """
    lock = _opened(kept_at)
    try:
        while lock is not None and not _taken(lock) and not given_up.wait(_LOOK):
            pass
        yield
    finally:
        if lock is not None:
            Path(f"{kept_at}.turn").unlink(missing_ok=True)  # whoever waits for it has it open
            os.close(lock)


def _opened(kept_at: Path | None) -> int | None:
    if kept_at is None:
        return None
    with contextlib.suppress(OSError):
        kept_at.parent.mkdir(parents=True, exist_ok=True)
        return os.open(f"{kept_at}.turn", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    return None


def _taken(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # no locks here
    return True
