"""The protocols of storage: which package each needs, and how its client is configured with our limits."""

import inspect
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

from logitcache.errors import MissingExtraError, RecipeError

S3, WEB = ("s3", "s3a"), ("http", "https")
_TAGS = ("ETag", "etag", "mtime", "created")  # of s3 and web servers, of other clouds, of disks, of fsspec's memory
_FRESH_SECONDS = 2
_EXTRAS = dict.fromkeys(S3, "s3") | dict.fromkeys(WEB, "http")


class Entry(NamedTuple):
    """A file in a listing: its size, and a tag that changes with its content if the storage has one."""

    size: int
    tag: str


def connected(scheme: str, requests: int, connect_seconds: float, read_seconds: float) -> Any:
    """Return a new file system of fsspec's, or one of its methods, which retries nothing and caches no listing.

    It has so many requests in flight at most, and waits so long for a connection and between bytes.

    Raises MissingExtraError or RecipeError for a protocol that is not available.
    """
    try:
        if scheme in WEB:
            found = _web(connect_seconds, read_seconds)
        else:
            found = _filesystem(scheme, _s3(requests, connect_seconds, read_seconds) if scheme in S3 else {})
    except RecipeError:
        raise
    except ImportError as error:
        if scheme in _EXTRAS:
            raise MissingExtraError(f"{scheme}://", _EXTRAS[scheme]) from error
        raise RecipeError(f"{scheme}:// needs another package: {error}") from error
    except ValueError as error:
        raise RecipeError(
            f"{scheme}:// is no protocol that fsspec knows. Fix: s3://, http(s):// or another of fsspec's, or a path"
        ) from error
    if hasattr(found, "retries"):
        found.retries = 1  # it is tried again here, and not by both
    return found


def list_page(files: Any, scheme: str, path: str, token: str) -> tuple[dict[str, Entry], str]:
    """Return files below a path by key, and the token of the next ones; all of them and "" if there are no pages."""
    if scheme in S3:
        from logitcache.store.remote.s3 import page

        found, following = page(files, path, token)
        return {key: entry(info) for key, info in found.items()}, following
    start = len(path.lstrip("/")) + 1
    found = files.find(path, detail=True)
    return {str(name).lstrip("/")[start:]: entry(info) for name, info in found.items()}, ""


def entry(info: Mapping[str, Any]) -> Entry:
    """Return the size of a file, and its tag or else when it was changed, from what a protocol reports."""
    found = [str(info[name]) for name in _TAGS if info.get(name)]
    return Entry(int(info.get("size") or 0), found[0] if found else _past(info.get("Last-Modified", "")))


def _past(date: str) -> str:
    """Return the date of a change; "" for a fresh one, as another change within its second would not show."""
    try:
        changed = parsedate_to_datetime(date).timestamp()
    except (TypeError, ValueError, OverflowError):
        return ""  # no date, or none that can be compared
    return date if time.time() - changed >= _FRESH_SECONDS else ""


def _filesystem(scheme: str, options: Mapping[str, Any]) -> Any:
    import fsspec

    made = fsspec.get_filesystem_class(scheme)
    try:  # before it is begun to be made: some leave a traceback of their own otherwise
        inspect.signature(made.__init__).bind(None, **options)
    except TypeError as error:  # ftp and others want a host, or an account
        raise RecipeError(
            f"{scheme}:// needs more than a URL states: {error}. Fix: s3://, http(s)://, or a path"
        ) from error
    return made(skip_instance_cache=True, use_listings_cache=False, **options)


def _web(connect_seconds: float, read_seconds: float) -> Any:
    import aiohttp

    from logitcache.store.remote.web import Web

    return Web(aiohttp.ClientTimeout(total=None, sock_connect=connect_seconds, sock_read=read_seconds))


def _s3(requests: int, connect_seconds: float, read_seconds: float) -> Mapping[str, Any]:
    from logitcache.store.remote.s3 import S3Session

    retries = {"total_max_attempts": 1}
    seconds = {"connect_timeout": connect_seconds, "read_timeout": read_seconds}
    pool = {"max_pool_connections": requests, "http_session_cls": S3Session}
    # With more at once, s3fs asks for the size before each read.
    return {"config_kwargs": {**seconds, **pool, "retries": retries}, "max_concurrency": 1}
