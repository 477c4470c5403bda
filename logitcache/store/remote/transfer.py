"""Bounds of one request to storage, in bytes and time, and what to make of one that fails.

The deadline moves with the bytes received. Messages hold nothing that is secret.
"""

import asyncio
import math
import os
import re
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol
from urllib.parse import SplitResult, urlsplit

from logitcache.errors import LogitCacheError, RecipeError, RemoteError
from logitcache.store.remote.protocols import S3, WEB

MAX_ANSWER_BYTES = 64 << 20
"""Most bytes of an answer whose size is not known, such as metadata."""

MAX_ERROR_BYTES = 1 << 20
"""Most bytes of an answer that reports an error."""

LOWEST_RATE = 16 << 10
"""Bytes per second that a request must reach on average, after its constant time."""

CHUNK = 256 << 10

REQUEST_SECONDS, VARIABLE = 30.0, "LOGITCACHE_REQUEST_SECONDS"
"""Time of a request beyond what its bytes take at the lowest rate; the environment variable that sets another."""

_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID")
_KEY_ID = re.compile(r"\bA[KS]IA[A-Z0-9]{12,}\b")
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")
_LONGEST_MESSAGE = 300
_CREDENTIAL_NAMES = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound")
_HOPELESS_NAMES = (*_CREDENTIAL_NAMES, "InvalidURL", "ParamValidationError")
_WHERE_CREDENTIALS = (
    "credentials where the tools of this storage look for them (for s3, AWS_PROFILE or AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY in the environment)"
)
_PASSING_STATUS = (408, 409, 425, 429)
_PASSING_CODES = ("RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch", "SlowDown")
ABSENT = (404, 410)
PRECONDITION_FAILED = 412

CHANGES = "it is being written. Fix: run the same command again once it is complete"
NO_RANGES = (
    "this server does not hand out parts of a file (ranges). Fix: a server that does, object storage, or a copy on "
    "this machine"
)


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


_HOPELESS = (PermissionError, NotImplementedError, TypeError, ImportError, LogitCacheError, Refused)


def require_place(parts: SplitResult) -> None:
    """Raise RecipeError for a URL that holds more than a place, or none."""
    if not parts.netloc and parts.scheme.lower() in (*S3, *WEB):
        raise RecipeError(f"{parts.geturl()} names no bucket or server. Fix: a URL as s3://bucket/name")
    # A secret with a slash ends what is taken for the server's name.
    torn = parts.netloc.count(":") == 1 and "@" in parts.path and not parts.netloc.rpartition(":")[2].isdigit()
    if not (torn or "@" in parts.netloc or parts.query or parts.fragment):
        return
    shown = f"{parts.scheme}://{(parts.netloc + parts.path).rpartition('@')[2]}"
    raise RecipeError(
        f"{shown} was given with credentials or a query, which logs and results would keep. Fix: the plain URL, and "
        f"{_WHERE_CREDENTIALS}"
    )


def status_of(error: BaseException | None) -> int | None:
    """Return the HTTP status of an error or its cause, if any."""
    return _answer(error)[0]


def refusal(error: Exception, where: str, doing: str) -> RemoteError | None:
    """Return the error of a request that would fail again; None for others, and if just a file is missing."""
    refused = f"{where}: cannot {doing} it"
    for cause in _causes(error):
        if isinstance(cause, Refused):
            return RemoteError(f"{refused}: {plain(cause)}")
    if _answer(error)[1] == "NoSuchBucket":
        bucket = "/".join(where.split("/")[:3])
        return RemoteError(f"{refused}: there is no such bucket, {bucket}. Fix: create it, or correct the URL")
    if isinstance(error, FileNotFoundError | FileExistsError | LogitCacheError) or may_pass(error):
        return None
    status, _, target = _answer(error)
    if status is not None and 300 <= status < 400:
        return RemoteError(
            f"{refused}: the storage redirects ({status}) to {target or 'another place'}, and credentials and writes "
            "stay with its endpoint. Fix: name the region or the endpoint of the bucket (AWS_DEFAULT_REGION, "
            "AWS_ENDPOINT_URL)"
        )
    fix = f"\n  Fix: {_WHERE_CREDENTIALS}" if type(error).__name__ in _CREDENTIAL_NAMES else ""
    return RemoteError(f"{refused}: {plain(error)}{fix}")


def may_pass(error: Exception) -> bool:
    """Whether another attempt may succeed: not if access is refused or the request is wrong."""
    if isinstance(error, _HOPELESS) or type(error).__name__ in _HOPELESS_NAMES:
        return False
    status, code = _answer(error)[:2]
    refused = status is not None and 300 <= status < 500
    return not refused or status in _PASSING_STATUS or code in _PASSING_CODES


def plain(error: Exception) -> str:
    """Return the text of an error without anything that is secret."""
    text = " ".join(str(error).split()) or type(error).__name__
    for name in _SECRETS:
        secret = os.environ.get(name)
        if secret:
            text = text.replace(secret, "…")
    text = text.replace(" ssl:default", "")  # which aiohttp adds for servers without it, too
    return _CREDENTIALS.sub("", _KEY_ID.sub("…", text))[:_LONGEST_MESSAGE]


def _answer(error: BaseException | None) -> tuple[int | None, str, str]:
    """Return the status, the code and the host of a redirect from a StatusError or botocore's error within s3fs's."""
    for found in (error, error and error.__cause__, error and error.__context__):
        status = getattr(found, "status", None)
        if isinstance(status, int):
            return status, "", ""
        response: Any = getattr(found, "response", None)
        if isinstance(response, dict):
            head, details = response.get("ResponseMetadata", {}), response.get("Error", {})
            target = urlsplit(head.get("HTTPHeaders", {}).get("location", "")).hostname or details.get("Endpoint", "")
            return head.get("HTTPStatusCode"), str(details.get("Code", "")), target
    return None, "", ""


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what led to it; botocore wraps what its handlers raise."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
