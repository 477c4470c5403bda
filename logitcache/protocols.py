"""The protocols of storage: which package each needs, and how its own client is told of our limits."""

import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from logitcache.errors import MissingExtraError, RecipeError

S3, WEB = ("s3", "s3a"), ("http", "https")
_EXTRAS = dict.fromkeys(S3, "s3") | dict.fromkeys(WEB, "http")


class Limits(NamedTuple):
    """How many requests may be in flight, and how long a server may take to answer and to send on."""

    requests: int
    connect_seconds: float
    read_seconds: float


def connected(scheme: str, limits: Limits) -> Any:
    """Return a new file system of fsspec's, which tries nothing again and remembers no listing.

    Raises MissingExtraError or RecipeError for a protocol that is not there.
    """
    import fsspec

    try:
        found = fsspec.filesystem(
            scheme, skip_instance_cache=True, use_listings_cache=False, **_options(scheme, limits)
        )
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


def _options(scheme: str, limits: Limits) -> Mapping[str, Any]:
    if scheme in S3:
        retries = {"total_max_attempts": 1}
        seconds = {"connect_timeout": limits.connect_seconds, "read_timeout": limits.read_seconds}
        options = {**seconds, "retries": retries, "max_pool_connections": limits.requests}
        return {"config_kwargs": options, "max_concurrency": 1}  # or every read would ask for the size first
    if scheme in WEB:
        timeout = importlib.import_module("aiohttp").ClientTimeout(
            sock_connect=limits.connect_seconds, sock_read=limits.read_seconds, total=None
        )
        return {"client_kwargs": {"timeout": timeout}}
    return {}
