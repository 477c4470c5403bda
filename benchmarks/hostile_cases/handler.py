"""A server of the case's own files, whose answers a fault replaces."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from hostile_cases.common import (
    REQUEST_SECONDS,
)

Reply = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """Serve the files of the case's folder as a web server or as S3, except where a fault replies."""

    protocol_version = "HTTP/1.1"
    folder: Path
    fault: Callable[["Handler"], bool]
    keys: tuple[str, ...] = ()
    visits: Path

    def log_message(self, *arguments: object) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        """Answer a request."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError, TimeoutError):
            if not type(self).fault(self):
                self.plain()

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def send(self, status: int, body: bytes = b"", **headers: str) -> None:
        """Send a whole answer."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    @property
    def where(self) -> str:
        """The path of the request below the bucket."""
        from urllib.parse import unquote

        return unquote(self.path.partition("?")[0]).removeprefix("/bucket").lstrip("/")

    def plain(self) -> None:
        """Answer as a sound server does."""
        if "list-type" in self.path or self.path.partition("?")[0] in ("/bucket", "/bucket/"):
            return self.listing()
        file = self.folder / self.where
        if self.command in ("PUT", "POST", "DELETE") or not file.is_file():
            return self.send(404 if self.command in ("GET", "HEAD") else 403)
        data = file.read_bytes()
        span = self.headers.get("Range", "")
        if not span:
            return self.send(200, data, Accept_Ranges="bytes")
        start, _, stop = span.removeprefix("bytes=").partition("-")
        part = data[int(start) : int(stop) + 1 if stop else None]
        self.send(206, part, Content_Range=f"bytes {start}-{int(start) + len(part) - 1}/{len(data)}")

    def listing(self) -> None:
        """List the files below a prefix, and the evil keys."""
        from urllib.parse import parse_qs, urlsplit
        from xml.sax.saxutils import escape

        query = parse_qs(urlsplit(self.path).query)
        prefix = query.get("prefix", [""])[0]
        found = {
            file.relative_to(self.folder).as_posix(): file.stat().st_size
            for file in sorted(self.folder.rglob("*"))
            if file.is_file()
        }
        found |= dict.fromkeys(self.keys, 80)
        rows = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{size}</Size><ETag>&quot;{hash(key) & 0xFFFF:x}&quot;</ETag>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for key, size in found.items()
            if key.startswith(prefix) or "../" in key
        )
        body = f"<ListBucketResult><Name>bucket</Name><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>"
        self.send(200, body.encode(), Content_Type="application/xml")


@contextlib.contextmanager
def serving(
    folder: Path, fault: Callable[[Handler], bool], keys: tuple[str, ...] = ()
) -> Iterator[tuple[dict[str, str], list[int]]]:
    """Serve a folder from a child process, beside a second server to which nobody should come."""
    visits = folder / "visits.txt"
    names = {"folder": folder, "fault": staticmethod(fault), "keys": keys, "visits": visits}
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), type("Served", (Handler,), names)) for _ in range(2)]
    ports = [server.server_address[1] for server in servers]
    for server in servers:
        server.handle_error = lambda request, address: None  # a client that hangs up is what a case wants
    child = os.fork()
    if child == 0:
        os.setsid()
        os.environ["TRAP"] = str(ports[1])
        threading.Thread(target=servers[1].serve_forever, daemon=True).start()
        with contextlib.suppress(BaseException):
            servers[0].serve_forever()
        os._exit(0)
    for server in servers:
        server.socket.close()
    (folder / "port").write_text(str(ports[0]))
    environment = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports[0]}", "CASE_PORT": str(ports[0]), **LOW}
    try:
        yield environment, ports[:1]
    finally:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)


LOW = {"LOGITCACHE_REQUEST_SECONDS": str(REQUEST_SECONDS)}
"""The environment that sets the limits of requests low."""
