"""Failures of requests: whether another attempt may help, and messages without anything that is secret."""

import os
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import SplitResult, urlsplit

from logitcache.errors import LogitCacheError, RecipeError, RemoteError
from logitcache.store.remote.protocols import S3, WEB
from logitcache.store.remote.transfer import Refused

_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID")
_KEY_ID = re.compile(r"\bA[KS]IA[A-Z0-9]{12,}\b")
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")
_LONGEST_MESSAGE = 300

_HOPELESS = (PermissionError, NotImplementedError, TypeError, ImportError, LogitCacheError, Refused)
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


def require_location(parts: SplitResult) -> None:
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
            return RemoteError(f"{refused}: {without_secrets(cause)}")
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
    return RemoteError(f"{refused}: {without_secrets(error)}{fix}")


def may_pass(error: Exception) -> bool:
    """Whether another attempt may succeed: not if access is refused or the request is wrong."""
    if isinstance(error, _HOPELESS) or type(error).__name__ in _HOPELESS_NAMES:
        return False
    status, code = _answer(error)[:2]
    refused = status is not None and 300 <= status < 500
    return not refused or status in _PASSING_STATUS or code in _PASSING_CODES


def without_secrets(error: Exception) -> str:
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
