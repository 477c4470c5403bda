"""Web servers: files are read by GET and HEAD without credentials, and few redirects are followed."""

import asyncio
import ipaddress
import weakref
from collections.abc import Mapping
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import DefaultResolver
from fsspec.asyn import get_loop, sync
from fsspec.implementations.http import HTTPFileSystem
from yarl import URL

from logitcache.store.remote.failures import ABSENT, NO_RANGES
from logitcache.store.remote.transfer import Refused, current

REDIRECTS = 5
_REDIRECTED = (301, 302, 303, 307, 308)
_KEPT = ("ETag", "Last-Modified")


class StatusError(OSError):
    """A web server answers with an error; the address, which may hold a secret after a redirect, is not shown."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        super().__init__(f"the server answers {response.status} {response.reason or ''}".rstrip())
        self.status = response.status


class Web:
    """Files of web servers by their URLs, with the methods of fsspec's file systems that Remote calls."""

    def __init__(self, timeout: aiohttp.ClientTimeout) -> None:
        self._timeout = timeout
        self._sessions: dict[bool, aiohttp.ClientSession] = {}

    def cat_file(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
        """Return the bytes of a file, or start..end of it."""
        found: bytes = sync(get_loop(), self._read, path, start, end)
        return found

    def info(self, path: str) -> Mapping[str, Any]:
        """Return the size of a file, if the server states it, and what changes with its content."""
        found: Mapping[str, Any] = sync(get_loop(), self._info, path)
        return found

    async def _read(self, path: str, start: int | None, end: int | None) -> bytes:
        span = {} if start is None or end is None else {"Range": f"bytes={start}-{end - 1}"}
        async with await self._opened("GET", path, span) as response:
            _require_status(response, path)
            if start and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                raise Refused(NO_RANGES)
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise Refused(
                    "the server sends it compressed (Content-Encoding). Fix: let the server send files as they are"
                )
            transfer = current.get()
            return await transfer.read(response.content, transfer.bounds.most)

    async def _info(self, path: str) -> Mapping[str, Any]:
        async with await self._opened("HEAD", path, {}) as response:
            if response.status in ABSENT:
                raise FileNotFoundError(path)
            if response.status == 200 and response.headers.get("Content-Length") is not None:
                return _entry_of(response)
        async with await self._opened("GET", path, {}) as response:  # a server may know no HEAD
            _require_status(response, path)
            return _entry_of(response)

    async def _opened(self, method: str, path: str, headers: Mapping[str, str]) -> aiohttp.ClientResponse:
        """Request a URL, and follow redirects."""
        first = here = URL(path)
        session = self._session(public=False)
        for _ in range(REDIRECTS + 1):
            async with current.get().in_time():
                response = await session.request(method, here, headers=headers, allow_redirects=False)
                if response.status not in _REDIRECTED:
                    return response
                response.close()
                here = _target(here, response)
                # A private server that the user named may redirect to itself, and to no other private one.
                is_named = here.host == first.host and not await _is_public(first)
                if not is_named and not _is_public_literal(here.host or ""):
                    raise Refused(f"the server redirects to {here.host}, which is no public address")
                session = self._session(public=not is_named)
        raise Refused(f"the server redirects more than {REDIRECTS} times")

    def _session(self, *, public: bool) -> aiohttp.ClientSession:
        """Return the session for URLs that users name, or the one that connects to public addresses only."""
        if public not in self._sessions:
            session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(resolver=_PublicResolver() if public else None),
                timeout=self._timeout,
                headers={"Accept-Encoding": "identity"},
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
            )
            weakref.finalize(self, HTTPFileSystem.close_session, get_loop(), session)
            self._sessions[public] = session
        return self._sessions[public]


def _require_status(response: aiohttp.ClientResponse, path: str) -> None:
    if response.status in ABSENT:
        raise FileNotFoundError(path)
    if 300 <= response.status < 400:
        raise Refused(f"the server answers {response.status}, which is no redirect that can be followed")
    if not response.ok:
        raise StatusError(response)


def _entry_of(response: aiohttp.ClientResponse) -> Mapping[str, Any]:
    plain = response.headers.get("Content-Encoding", "identity") == "identity"
    size = response.headers.get("Content-Length") if plain else None
    tags = {name: response.headers[name] for name in _KEPT if name in response.headers}
    return {"size": None if size is None else int(size), **tags}


def _target(here: URL, response: aiohttp.ClientResponse) -> URL:
    """Return the address that a redirect names; raise Refused for one that is less safe than the present one."""
    try:
        target = here.join(URL(response.headers.get("Location", "")))
    except ValueError as error:
        raise Refused("the server redirects to an address that is none") from error
    secure = target.scheme == "https" or (target.scheme == "http" == here.scheme)
    if not secure or not target.host:
        raise Refused(f"the server redirects from {here.scheme}:// to {target.scheme or 'no'}://")
    if target.user is not None or target.password is not None:
        raise Refused("the server redirects to an address with credentials")
    return target.with_fragment(None)


async def _is_public(url: URL) -> bool:
    """Whether a host has public addresses only."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(url.host, url.port)
    except OSError:
        return True
    return all(_is_public_literal(str(address[0])) for *_, address in found)


def _is_public_literal(host: str) -> bool:
    """Whether a host is a name, or an address of the public internet."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return True
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_global


class _PublicResolver(AbstractResolver):
    """Resolves names as usual; raises Refused for a name of a private, loopback or link-local address."""

    def __init__(self) -> None:
        self._resolver = DefaultResolver()

    async def resolve(self, host: str, port: int = 0, family: Any = 0) -> list[ResolveResult]:
        found = await self._resolver.resolve(host, port, family)
        for result in found:
            if not _is_public_literal(result["host"]):
                raise Refused(f"the server redirects to {host}, whose address {result['host']} is not public")
        return found

    async def close(self) -> None:
        await self._resolver.close()
