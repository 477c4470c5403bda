"""Files elsewhere, named by URL: read and written through fsspec, tried again when that may help, some at a time.

Credentials come from the places of the protocol's own tools (for s3 the environment, profiles and roles of AWS),
and from nowhere else: a URL that carries any is refused, and no message shows them.
"""

import contextlib
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

from logitcache.errors import LogitCacheError, RecipeError, RemoteError
from logitcache.store.remote.failures import (
    CHANGES,
    NO_RANGES,
    PRECONDITION_FAILED,
    refusal,
    require_location,
    status_of,
    without_secrets,
)
from logitcache.store.remote.protocols import S3, WEB, connected, entry, list_page
from logitcache.store.remote.protocols import Entry as Entry
from logitcache.store.remote.transfer import MAX_ANSWER_BYTES, METADATA, Bounds, Refused, request_seconds, too_long

REQUESTS = 16
"""Requests of a process that are in flight at a time."""

ATTEMPTS, PAUSE, LONGEST_PAUSE, PATIENCE = 6, 0.25, 8.0, 90.0
"""A request is tried so often, with pauses that double from PAUSE seconds on, and not again after PATIENCE seconds."""

CONNECT_SECONDS, READ_SECONDS = 10, 30
"""How long a server may take to accept a connection, and may pause between bytes."""

LISTED, LISTED_EACH_SECOND = 4_000_000, 50
"""Most files of a listing, and files per second that it must have on average after PATIENCE seconds."""

PART = 8 << 20
"""Bytes of a large file that one request reads."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


T = TypeVar("T")
R = TypeVar("R")


def is_remote(location: str | os.PathLike[str]) -> bool:
    """Whether a location is a URL, as s3://bucket/name is, and not a path of this machine."""
    return _SCHEME.match(os.fspath(location)) is not None


class Remote:
    """A folder or a file at a URL. It can be pickled: each process connects by itself.

    Keys name what lies below it, with "/" between folders; the key "" is the URL itself. All methods may be called
    from several threads. They raise RemoteError if the storage does not answer or refuses, FileNotFoundError if
    there is nothing; nothing is retried that would fail again.
    """

    def __init__(self, url: str) -> None:
        """Take a URL apart; raise RecipeError for one that carries credentials or a query."""
        parts = urlsplit(url)
        require_location(parts)
        self.url = url.rstrip("/")
        self.scheme = parts.scheme.lower()

    def __reduce__(self) -> tuple[Any, ...]:
        return Remote, (self.url,)

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return self.url.rpartition("/")[2]

    @property
    def is_listable(self) -> bool:
        """Whether the storage lists what it has; a web server only hands out what is named, and takes nothing."""
        return self.scheme not in WEB

    def at(self, key: str) -> "Remote":
        """Return what lies below at a key."""
        return Remote(f"{self.url}/{key}")

    def read(self, key: str = "", size: int | None = None, most: int = MAX_ANSWER_BYTES) -> bytes:
        """Return the bytes of a file, of `most` at most if its size is not known, else in parallel parts."""
        if size is None:
            return self._read(lambda fs: fs.cat_file(self._path(key)), key, Bounds(most, excess=too_long(most)))
        starts = range(0, size, PART)
        return b"".join(self.each(lambda start: self.read_range(key, start, min(start + PART, size)), starts))

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        """Return the bytes start..stop of a file."""
        if start == stop:
            return b""  # no request can ask for nothing
        bounds = Bounds(stop - start, excess=NO_RANGES)
        found = self._read(lambda fs: fs.cat_file(self._path(key), start=start, end=stop), key, bounds)
        if len(found) != stop - start:
            raise RemoteError(f"{self._shown(key)}: {len(found)} bytes where {stop - start} were asked for: {CHANGES}")
        return found

    def _read(self, function: Callable[[Any], bytes], key: str, bounds: Bounds) -> bytes:
        """Return the bytes of an answer; at the bound s3 and web servers are stopped, others refused."""

        def bounded(fs: Any) -> bytes:
            found = bytes(function(fs))
            if len(found) > bounds.most:
                raise Refused(bounds.excess)
            return found

        return self._request("read", bounded, key, bounds)

    def size(self, key: str = "") -> int:
        """Return the size of a file in bytes."""
        size = self._info(key).get("size")
        return len(self.read(key)) if size is None else int(size)

    def entry(self, key: str = "") -> Entry:
        """Return the entry that a listing would have of a file; raise RemoteError if the server states no size."""
        found = self._info(key)
        if found.get("size") is None:
            raise RemoteError(f"{self._shown(key)}: the server does not state its number of bytes")
        return entry(found)

    def _info(self, key: str) -> Mapping[str, Any]:
        """Request the metadata of a file; a folder is none."""
        found: Mapping[str, Any] = self._request("examine", lambda fs: fs.info(self._path(key)), key)
        if found.get("type") == "directory":
            raise FileNotFoundError(self._shown(key))
        return found

    def exists(self, key: str = "") -> bool:
        """Whether a file is there."""
        try:
            self.size(key)
        except FileNotFoundError:
            return False
        return True

    def list(self, key: str = "") -> dict[str, Entry]:
        """List all files below, at any depth, by key; none if there is nothing."""
        self._require_listable()
        below = f"{key}/" if key else ""
        try:
            found = {below + name: each for page in self._pages(key) for name, each in page.items()}
            return found or {key: self.entry(key)}  # the URL may be a file
        except FileNotFoundError:
            return {}

    def _pages(self, key: str) -> Iterator[dict[str, Entry]]:
        """Yield the files below a key, page by page; raise RemoteError for a listing that does not end."""
        began, count, token, path = time.monotonic(), 0, "", self._path(key)
        while True:
            page, token = self._request("list", partial(list_page, scheme=self.scheme, path=path, token=token), key)
            count += len(page)
            yield page
            if not token:
                return
            if count > LISTED or count < LISTED_EACH_SECOND * (time.monotonic() - began - _patience()):
                raise RemoteError(
                    f"{self._shown(key)}: its listing does not end: {count} files in {time.monotonic() - began:.0f} s, "
                    f"and {LISTED} are the most.\n"
                    "  Fix: remove what does not belong there, or pack images into tar shards"
                )

    def write(self, key: str, data: bytes | bytearray | memoryview, *, new: bool = False) -> None:
        """Write a file whole or not at all; with `new` raise FileExistsError if there is one, and if the storage can.

        An attempt that seemed to fail may have written it: after FileExistsError compare the stored bytes.
        """
        self._require_listable()
        content = bytes(data)
        options = {"mode": "create"} if new and self.scheme in S3 else {}
        try:
            request = lambda fs: fs.pipe_file(self._path(key), content, **options)  # noqa: E731
            self._request("write", request, key, Bounds(sent=len(content)))
        except FileNotFoundError as error:
            fix = "name the folder without file://" if self.scheme == "file" else "create it, or correct the URL"
            shown = f"{self._shown(key)}: cannot write it: there is no such bucket or folder"
            raise RemoteError(f"{shown}. Fix: {fix}") from error
        except RemoteError as error:
            if new and status_of(error.__cause__) == PRECONDITION_FAILED:
                raise FileExistsError(self._shown(key)) from error
            raise

    def remove(self, keys: Iterable[str]) -> None:
        """Remove files; those that are not there are no error."""

        self._require_listable()

        def one(key: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                self._request("remove", lambda fs: fs.rm_file(self._path(key)), key)

        for _ in self.each(one, list(keys)):
            pass

    def each(self, function: Callable[[T], R], items: Sequence[T], at_once: int = REQUESTS) -> Iterator[R]:
        """Yield what a function of this storage returns for each item, in order; so many run at once."""
        if len(items) <= 1:
            yield from map(function, items)
            return
        pool = ThreadPoolExecutor(min(at_once, len(items)), thread_name_prefix="logitcache-remote")
        try:
            yield from pool.map(function, items)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _request(self, doing: str, function: Callable[[Any], R], key: str, bounds: Bounds = METADATA) -> R:
        """Make a request, and retry it if that may help."""
        began, pause = time.monotonic(), PAUSE
        for attempt in range(1, ATTEMPTS + 1):
            try:
                with _in_flight, bounds.kept():
                    return function(_file_system(self.scheme, os.getpid()))
            except Exception as error:  # each protocol has its own
                refused = refusal(error, self._shown(key), doing)
                if refused is not None:
                    raise refused from error
                if isinstance(error, FileNotFoundError):
                    raise FileNotFoundError(self._shown(key)) from error
                if isinstance(error, FileExistsError | LogitCacheError):
                    raise
                if attempt == ATTEMPTS or time.monotonic() - began > _patience():
                    raise RemoteError(
                        f"{self._shown(key)}: cannot {doing} it, tried {attempt} times in "
                        f"{time.monotonic() - began:.0f} s: {without_secrets(error)}.\n"
                        "  Fix: see that the storage answers, then run the same command again"
                    ) from error
            time.sleep(pause * _chance.uniform(0.5, 1.5))
            pause = min(2 * pause, LONGEST_PAUSE)
        raise AssertionError("the last attempt returns or raises")

    def _require_listable(self) -> None:
        if not self.is_listable:
            raise RecipeError(
                f"{self.url}: a web server only hands out what is named; nothing is listed, written or removed there. "
                "Fix: name storage such as s3://bucket/name, or a path"
            )

    @cached_property
    def _root(self) -> str:
        return self.url if self.scheme in WEB else _SCHEME.sub("", self.url)

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}" if key else self._root

    def _shown(self, key: str) -> str:
        return f"{self.url}/{key}" if key else self.url


def _patience() -> float:
    """Return after how many seconds a request is not retried."""
    return min(PATIENCE, 3 * request_seconds())


_in_flight = threading.BoundedSemaphore(REQUESTS)
_chance = random.Random()
"""Of its own: nobody else's random numbers change."""

_known: dict[tuple[str, int], Any] = {}
_making = threading.Lock()


def _renew() -> None:
    """Forget what threads of the parent held when this process was forked: they are not here to let go of it."""
    global _in_flight, _making
    _in_flight, _making = threading.BoundedSemaphore(REQUESTS), threading.Lock()


os.register_at_fork(after_in_child=_renew)


def _file_system(scheme: str, process: int) -> Any:
    """Return this process's file system of a protocol; a fork cannot use its parent's."""
    with _making:
        found = _known.get((scheme, process))
        if found is None:
            most = request_seconds()
            seconds = min(CONNECT_SECONDS, most), min(READ_SECONDS, most)
            found = _known[scheme, process] = connected(scheme, REQUESTS, *seconds)
        return found
