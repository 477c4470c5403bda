"""Storage for the tests: an S3 emulator and a web server on loopback, behind a front that fails on purpose.

    python -m tests.objects [LATENCY]

serves a bucket in a process of its own: prints its environment as JSON, then what was asked of it for each line on its
stdin, and ends with it.
"""

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from functools import cache
from http.client import HTTPConnection
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import boto3  # type: ignore[import-untyped]
import pytest
from moto.core.models import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from moto.server import ThreadedMotoServer

from logitcache.store.remote import client
from tests.front import SHORT, Answer, Front, Origin, Request

KEY_ID, SECRET = "AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
"""Nobody's: those of the documentation of AWS."""

_DROPPED = ("connection", "transfer-encoding", "content-length", "keep-alive", "date", "server")


def folder(root: Path) -> Origin:
    """Serve the files below a folder, whole or a range of bytes, as a web server does."""

    def answer(request: Request) -> Answer:
        path = root / unquote(urlsplit(request.target).path).lstrip("/")
        if request.method not in ("GET", "HEAD"):
            return Answer(405, {}, b"", 0)
        if not path.is_file() or ".." in path.parts:
            return Answer(404, {}, b"", 0)
        data, span = path.read_bytes(), request.headers.get("range", "")
        if not span:
            return Answer(200, {"Accept-Ranges": "bytes"}, data, len(data))
        start, _, stop = span.removeprefix("bytes=").partition("-")
        part = data[int(start) : int(stop) + 1 if stop else None]
        if not part:
            return Answer(416, {"Content-Range": f"bytes */{len(data)}"}, b"", 0)
        shown = f"bytes {start}-{int(start) + len(part) - 1}/{len(data)}"
        return Answer(206, {"Content-Range": shown}, part, len(part))

    return answer


@cache
def _emulator() -> tuple[str, int]:
    """Start the emulator of this process, once: it takes seconds."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    return server.get_host_and_port()


def emulated(request: Request) -> Answer:
    """Ask the emulator of S3."""
    with closing(HTTPConnection(*_emulator())) as connection:
        passed = {name: value for name, value in request.headers.items() if name != "expect"}
        connection.request(request.method, request.target, request.body, passed)
        found = connection.getresponse()
        body = found.read()
        headers = {name: value for name, value in found.getheaders() if name.lower() not in _DROPPED}
        size = int(found.getheader("content-length", "0")) if request.method == "HEAD" else len(body)
        return Answer(found.status, headers, body, size)


@cache
def _client() -> Any:
    """Connect to the emulator by another library than the one that is tested, and past the front."""
    address = "http://{}:{}".format(*_emulator())
    names = {"aws_access_key_id": KEY_ID, "aws_secret_access_key": SECRET, "region_name": "us-east-1"}
    return boto3.client("s3", endpoint_url=address, **names)


class Bucket:
    """A bucket of its own behind a front, and what is in it."""

    _numbers = count(1)

    def __init__(self) -> None:
        self.name = f"bucket-{next(self._numbers)}"
        self.url = f"s3://{self.name}"
        _client().create_bucket(Bucket=self.name)
        self.front = Front(emulated, f"/{self.name}")

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs to reach it."""
        access = {"AWS_ACCESS_KEY_ID": KEY_ID, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}
        return {**access, "AWS_ENDPOINT_URL": self.front.url, "AWS_EC2_METADATA_DISABLED": "true"}

    def put(self, key: str, data: bytes) -> None:
        _client().put_object(Bucket=self.name, Key=key, Body=data)

    def fill(self, below: str, files: Mapping[str, bytes]) -> str:
        """Write many objects within the emulator, below a key; returns their URL."""
        for key, data in files.items():
            s3_backends[DEFAULT_ACCOUNT_ID]["aws"].put_object(self.name, f"{below}/{key}", data)
        return f"{self.url}/{below}"

    def get(self, key: str) -> bytes:
        body: bytes = _client().get_object(Bucket=self.name, Key=key)["Body"].read()
        return body

    def remove(self, key: str) -> None:
        _client().delete_object(Bucket=self.name, Key=key)

    def keys(self, below: str = "") -> list[str]:
        pages = _client().get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=below)
        return [found["Key"] for page in pages for found in page.get("Contents", ())]

    def contents(self, below: str) -> dict[str, bytes]:
        """Return the bytes of every object below a key, by what follows it."""
        return {key.removeprefix(f"{below}/"): self.get(key) for key in self.keys(f"{below}/")}


@contextmanager
def bucket(**changes: Any) -> Iterator[Bucket]:
    """Serve an empty bucket, to which this process and its children connect; changes what remote.py waits for."""
    found = Bucket()
    try:
        with connecting(found.environment, **changes):
            yield found
    finally:
        found.front.close()


@contextmanager
def website(root: Path, **changes: Any) -> Iterator[Front]:
    """Serve a folder by HTTP."""
    front = Front(folder(root))
    try:
        with connecting({}, **changes):
            yield front
    finally:
        front.close()


_kept: list[Any] = []


@contextmanager
def connecting(environment: Mapping[str, str], **changes: Any) -> Iterator[None]:
    """Let this process connect anew by an environment, and wait less than it does for real storage."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("AWS_PROFILE", raising=False)
        for name, value in environment.items():
            patch.setenv(name, value)
        for name, value in (SHORT | changes).items():
            patch.setattr(client, name, value)
        patch.setattr(client, "_known", {})
        # Closed with this process: closing takes a moment of fsspec's thread, and it is given a tenth of a second.
        _kept.append(client._known)
        yield


def main(latency: float = 0.0) -> None:
    served = Bucket()
    served.front.latency = latency
    print(json.dumps({"url": served.url, "environment": served.environment}), flush=True)
    for _ in sys.stdin:
        print(json.dumps([seen._asdict() for seen in served.front.seen]), flush=True)
    served.front.close()


if __name__ == "__main__":
    main(*map(float, sys.argv[1:]))
