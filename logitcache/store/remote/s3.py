"""S3 through s3fs: no redirect is followed to another domain, answers are bounded, and listings come page by page."""

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from aiobotocore.httpsession import AIOHTTPSession  # type: ignore[import-untyped]
from s3fs import S3FileSystem  # type: ignore[import-untyped]

from logitcache.store.remote.transfer import MAX_ERROR_BYTES, Refused, current

_AWS = re.compile(r"([a-z0-9-]+)\.(amazonaws\.[a-z]+(?:\.[a-z]+)?)$")


class S3Session(AIOHTTPSession):  # type: ignore[misc]
    """The HTTP session of a client of S3, which keeps credentials and writes within the domain of its endpoint.

    A bucket of another region is one of another host: botocore finds it, here it must be of the same AWS partition.
    """

    _partition: str | None = None

    async def send(self, request: Any) -> Any:
        """Send a signed request; raise Refused if it would leave the partition of the first one."""
        partition = _partition_of(request.url)
        if self._partition is None:
            self._partition = partition
        if partition != self._partition:
            raise Refused(
                f"the storage redirects to {urlsplit(request.url).hostname}, and credentials stay with the endpoint"
            )
        response = await super().send(request)
        if not isinstance(response.raw, _Answer):
            raise Refused("this version of aiobotocore follows redirects. Fix: pip install 'logitcache[s3]'")
        return response

    async def _get_session(self, proxy_url: str | None) -> "_Unredirected":
        return _Unredirected(await super()._get_session(proxy_url))


class _Unredirected:
    """A session of aiohttp that follows no redirect and bounds what it receives."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def request(self, method: str, **options: Any) -> "_Answer":
        async with current.get().in_time():
            return _Answer(await self._session.request(method, allow_redirects=False, **options))


class _Answer:
    """What aiobotocore uses of an answer of aiohttp; it is its own `content`."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.status, self.url = response.status, response.url
        self.headers, self.raw_headers = response.headers, response.raw_headers
        self._response, self._transfer = response, current.get()

    @property
    def content(self) -> "_Answer":
        return self

    async def read(self, amount: int = -1) -> bytes:
        """Read all of it: s3fs never asks for less."""
        try:
            most = MAX_ERROR_BYTES if self.status >= 300 else self._transfer.bounds.most
            return await self._transfer.read(self._response.content, most)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._response.close()


def _partition_of(url: str) -> str:
    """Return what the hosts of an AWS partition share, its domain and whether it is a government's; "" for others."""
    found = _AWS.search(urlsplit(url).hostname or "")
    return found[2] + " us-gov" * ("us-gov-" in found[1]) if found else ""


def page(files: S3FileSystem, path: str, token: str) -> tuple[dict[str, Mapping[str, Any]], str]:
    """Return up to a thousand objects below a path by key, and the token of the next ones or "".

    Raises Refused if the storage lists others.
    """
    bucket, key, _ = files.split_path(path)
    below = f"{key}/" if key else ""
    more = {"ContinuationToken": token} if token else {}
    found = files.call_s3("list_objects_v2", Bucket=bucket, Prefix=below, **more)
    entries: dict[str, Mapping[str, Any]] = {}
    for entry in found.get("Contents", ()):
        if not entry["Key"].startswith(below):
            raise Refused(f"the storage lists {entry['Key'][:200]!r}, which is not below the folder that was asked for")
        if entry["Key"] != below:  # an empty object that marks the folder
            entries[entry["Key"].removeprefix(below)] = {"size": entry["Size"], "ETag": entry.get("ETag", "")}
    following = found.get("NextContinuationToken", "") if found.get("IsTruncated") else ""
    if following == token != "":
        raise Refused("the storage lists the same page again and again")
    return entries, following
