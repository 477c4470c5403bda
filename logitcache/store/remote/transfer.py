"""Bounds of one request to storage: the bytes it may receive, and a deadline that moves with the bytes received."""

import asyncio
import math
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from typing import NamedTuple, Protocol

from logitcache.errors import RecipeError

MAX_ANSWER_BYTES = 64 << 20
"""Most bytes of an answer whose size is not known, such as metadata."""

MAX_ERROR_BYTES = 1 << 20
"""Most bytes of an answer that reports an error."""

LOWEST_RATE = 16 << 10
"""Bytes per second that a request must reach on average, after its constant time."""

CHUNK = 256 << 10

REQUEST_SECONDS, VARIABLE = 30.0, "LOGITCACHE_REQUEST_SECONDS"
"""Time of a request beyond what its bytes take at the lowest rate; the environment variable that sets another."""


class Refused(Exception):
    """An answer that no further attempt would improve: too long, compressed, or a redirect to another place."""


class Received(Protocol):
    """A body that is read as it arrives; empty bytes mark its end."""

    async def read(self, n: int = -1, /) -> bytes: ...


def request_seconds() -> float:
    """Return how long a request may take beyond its bytes: LOGITCACHE_REQUEST_SECONDS if set."""
    given = os.environ.get(VARIABLE)
    try:
        seconds = REQUEST_SECONDS if given is None else float(given)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise RecipeError(f"{VARIABLE} is {given!r}, no number of seconds. Fix: a number such as {REQUEST_SECONDS:g}")
    return seconds


def too_long(most: int) -> str:
    """Return what is reported of an answer of unknown size with more bytes than expected."""
    return f"the storage sends more than {most} bytes, which is the limit for metadata"


class Bounds(NamedTuple):
    """Most bytes of an answer, bytes that are uploaded, and what is reported of a longer answer."""

    most: int = MAX_ANSWER_BYTES
    sent: int = 0
    excess: str = too_long(MAX_ANSWER_BYTES)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Let this thread make one request within these bounds."""
        token = current.set(Transfer(self))
        try:
            yield
        finally:
            current.reset(token)


METADATA = Bounds()


class Transfer:
    """One request in progress, from connecting to the last byte of its answer."""

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self._deadline = time.monotonic() + request_seconds() + bounds.sent / LOWEST_RATE

    @asynccontextmanager
    async def in_time(self) -> AsyncIterator[None]:
        """Raise TimeoutError in the body of this context at the deadline."""
        try:
            async with asyncio.timeout(max(0.0, self._deadline - time.monotonic())):
                yield
        except TimeoutError as error:
            if str(error):
                raise
            raise TimeoutError("the storage answers too slowly") from error

    async def read(self, source: Received, most: int) -> bytes:
        """Read a body to its end; raise Refused at the first byte beyond `most`, without reading on."""
        found = bytearray()
        while chunk := await self._next(source):
            found += chunk
            self._deadline += len(chunk) / LOWEST_RATE
            if len(found) > most:
                raise Refused(self.bounds.excess)
        return bytes(found)

    async def _next(self, source: Received) -> bytes:
        async with self.in_time():
            return await source.read(CHUNK)


current: ContextVar[Transfer] = ContextVar("transfer")
"""The request that this thread makes; a task of an event loop inherits it from the thread that starts it."""
