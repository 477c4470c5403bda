"""A server on loopback that asks another for its answers, late, and fails on purpose."""

import gzip
import itertools
import random
import select
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

REFUSALS = {"500": "InternalError", "503": "SlowDown", "403": "AccessDenied", "412": "PreconditionFailed"}
FAULTS = ("500", "503", "silence", "cut")
"""Faults that pass: two answers, none at all, and a connection that ends in the middle of an answer."""

REDIRECTS = ("300", "301", "302", "303", "305", "307", "308")
STREAMS = ("drip", "drip head", "endless", "endless error", "endless head", "slow")
"""Answers that come byte by byte or never end; the last one is slow, and whole."""

LIES = ("short", "empty", "stale", "gzip")
"""Answers that are whole, and not of what was asked for; the first answer to the same request again, for one."""

SHORT = {"CONNECT_SECONDS": 2, "READ_SECONDS": 1.5, "PAUSE": 0.01, "LONGEST_PAUSE": 0.1}
"""What tests set in logitcache.store.remote.client, or they would wait for long."""


class Request(NamedTuple):
    """What a client asks; the names of headers are in lower case."""

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes


class Answer(NamedTuple):
    """What it is told; `size` is that of the body, which HEAD does not send."""

    status: int
    headers: dict[str, str]
    body: bytes
    size: int


class Seen(NamedTuple):
    """A request that came: its URL's path, the range asked for, what was injected, the bytes sent back, and when."""

    method: str
    path: str
    span: str
    fault: str
    sent: int
    at: float


Origin = Callable[[Request], Answer]


class Front:
    """A server on loopback that asks an origin, late, and fails on a fraction of requests.

    Which ones depends on the seed and the request alone: its method, its target after a prefix, its range, and how
    often it came before.
    """

    def __init__(self, origin: Origin, prefix: str = "") -> None:
        self.fraction, self.seed, self.latency = 0.0, 0, 0.0
        self.faults: tuple[str, ...] = FAULTS
        self.picked: Callable[[Request], bool] = lambda request: True
        """Which requests may fail."""
        self.location: Callable[[Request], str] = lambda request: request.target
        """Where redirects lead to."""
        self.headers: dict[str, str] = {}
        self.streamed = 0
        """Headers of redirects, and the bytes that streams sent."""
        self._first: dict[str, Answer] = {}
        self.seen: list[Seen] = []
        self.errors: list[str] = []
        self.most_at_once = 0
        self._origin, self._prefix, self._came = origin, prefix, Counter[tuple[str, str, str]]()
        self._lock, self._closing, self._at_once = threading.Lock(), threading.Event(), 0
        self._server = _Server(self)
        # Looks often whether it is to end.
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def fail(
        self, fraction: float, *faults: str, seed: int = 0, picked: Callable[[Request], bool] | None = None
    ) -> None:
        """Fail on this fraction of the requests from now on, by any fault that passes unless some are named."""
        self.fraction, self.faults, self.seed = fraction, faults or FAULTS, seed
        self.picked = picked or (lambda request: True)
        self._came.clear()

    def asked(self, method: str = "", part: str = "", *, failed: bool = False) -> list[Seen]:
        """List the requests of a method for paths with a part; those that came through, or those that did not."""
        return [s for s in self.seen if s.method.startswith(method) and part in s.path and bool(s.fault) == failed]

    def close(self) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.hang_up()
        self._server.server_close()
        self._thread.join()
        assert not self.errors, self.errors

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        """Answer one request, or fail."""
        length = int(handler.headers.get("content-length", 0))
        body = handler.rfile.read(length)
        if len(body) < length:  # the client was killed: an origin would wait for the rest
            handler.close_connection = True
            return
        headers = {name.lower(): value for name, value in handler.headers.items()}
        request = Request(handler.command, handler.path, headers, body)
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            time.sleep(self.latency)
            self._answer(handler, request, self._fault(request))
        finally:
            with self._lock:
                self._at_once -= 1

    def _answer(self, handler: BaseHTTPRequestHandler, request: Request, fault: str) -> None:
        handler.close_connection |= fault in ("silence", "cut")
        if fault == "silence":
            self._note(request, fault, 0)
            while not self._closing.is_set():
                if select.select([handler.connection], [], [], 0.02)[0]:  # the client has gone
                    return
            return
        if fault in STREAMS:
            self._note(request, fault, 0)
            self._stream(handler, fault, b"" if fault != "slow" else self._origin(request).body)
            return
        answer = self._wrong(fault, request)
        body = b"" if request.method == "HEAD" else answer.body
        sent = body[: len(body) // 2] if fault == "cut" else body
        # Before it is sent, so that a client that has its answer finds it noted.
        self._note(request, fault, len(sent))
        if body or fault != "cut":  # without a body, all of the answer is lost
            _send(handler, answer, sent)

    def _wrong(self, fault: str, request: Request) -> Answer:
        """Return the answer of the origin, or what a fault makes of it."""
        if fault in REFUSALS:
            return _refusal(fault, request)
        if fault in REDIRECTS:
            return Answer(int(fault), {"Location": self.location(request)} | self.headers, b"", 0)
        answer = self._origin(request)
        body = {"short": answer.body[: len(answer.body) // 2], "empty": b""}.get(fault)
        if body is not None:
            return answer._replace(body=body, size=len(body))
        if fault == "gzip":
            packed = gzip.compress(answer.body)
            return Answer(answer.status, answer.headers | {"Content-Encoding": "gzip"}, packed, len(packed))
        first = self._first.setdefault(f"{request.method} {request.target}", answer)
        return first if fault == "stale" else answer

    def _stream(self, handler: BaseHTTPRequestHandler, fault: str, body: bytes) -> None:
        """Send bytes until the client hangs up."""
        handler.close_connection = True
        status = 500 if fault == "endless error" else 200
        handler.send_response_only(status)
        if fault in ("drip", "slow"):
            handler.send_header("Content-Length", str(len(body) or 1 << 20))
        if fault.endswith("head"):
            handler.flush_headers()
            handler.wfile.write(b"X-First: ")
        else:
            handler.end_headers()
        slices = [body[at : at + 8192] for at in range(0, len(body), 8192)]
        endless = {"endless head": b"and\r\nX-More: more" * 4096}.get(fault, bytes(1 << 20))
        piece = endless if fault.startswith("endless") else b"x"
        pause = 0.0 if fault.startswith("endless") else 0.05
        for data in slices or itertools.repeat(piece):
            if self._closing.is_set():
                return
            handler.wfile.write(data)
            self.streamed += len(data)
            time.sleep(pause)

    def _note(self, request: Request, fault: str, sent: int) -> None:
        path = unquote(urlsplit(request.target).path)
        with self._lock:
            span = request.headers.get("range", "")
            self.seen.append(Seen(request.method, path, span, fault, sent, time.monotonic()))

    def _fault(self, request: Request) -> str:
        name = (request.method, request.target.removeprefix(self._prefix), request.headers.get("range", ""))
        with self._lock:
            self._came[name] += 1
            chance = random.Random(f"{self.seed} {name} {self._came[name]}")
        return chance.choice(self.faults) if chance.random() < self.fraction and self.picked(request) else ""


def _refusal(fault: str, request: Request) -> Answer:
    """Return an answer as S3 words it; this server is careless, and tells what it was sent."""
    sent = " ".join(request.headers.get(name, "") for name in ("authorization", "x-amz-security-token"))
    text = f"<Error><Code>{REFUSALS[fault]}</Code><Message>injected {sent}</Message></Error>".encode()
    return Answer(int(fault), {"Content-Type": "application/xml"}, text, len(text))


def _send(handler: BaseHTTPRequestHandler, answer: Answer, body: bytes) -> None:
    handler.send_response_only(answer.status)
    for name, value in answer.headers.items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(answer.size))
    handler.end_headers()
    handler.wfile.write(body)


class _Server(ThreadingHTTPServer):
    daemon_threads, request_queue_size = False, 128

    def __init__(self, front: Front) -> None:
        self._front, self._open, self._lock = front, set[socket.socket](), threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

            def do_GET(self) -> None:
                front.serve(self)

            do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

            def log_message(self, *arguments: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        if not isinstance(error, ConnectionError):  # clients may hang up
            self._front.errors.append(repr(error))

    def hang_up(self) -> None:
        with self._lock:
            for connection in self._open:
                with suppress(OSError):  # the client has
                    connection.shutdown(socket.SHUT_RDWR)
