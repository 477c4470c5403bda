"""SIGTERM and Ctrl-C ask for a stop; the loops end at the next safe point."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from types import FrameType

from logitcache.errors import Stopped


class StopFlag:
    """The first signal sets the flag; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._came: SimpleQueue[int] = SimpleQueue()  # unlike an Event, it may be used in the handler of a signal

    def __bool__(self) -> bool:
        return self.signum is not None

    def request(self, signum: int, frame: FrameType | None) -> None:
        """Record the signal, or interrupt when one is already recorded."""
        if self.signum is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = signum
        self._came.put(signum)

    def wait(self, seconds: float) -> bool:
        """Wait for a signal, at most so long; whether one came."""
        if self.signum is None and seconds > 0:
            with suppress(Empty):
                self._came.get(timeout=seconds)
        return self.signum is not None

    def stopped(self, message: str) -> Stopped:
        """Build the error that ends the command."""
        assert self.signum is not None
        return Stopped(message, self.signum)


@contextmanager
def stop_flag() -> Iterator[StopFlag]:
    """Catch SIGTERM and SIGINT while the block runs; in another than the main thread nothing can be caught."""
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    previous = {signum: signal.signal(signum, flag.request) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield flag
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def ignore_signals() -> None:
    """Leave signals to the parent: a terminal or a scheduler sends them to loader workers as well."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
