"""Servers with a fault, and keys that lead outside."""

import os
import time
from collections.abc import Callable

from hostile_cases.common import (
    BOMB,
    DAMAGED,
    OK,
    OTHER,
    READERS,
    REQUEST_SECONDS,
    USAGE,
    Case,
)
from hostile_cases.handler import Handler, Reply, serving


def server(
    name: str,
    fault: Callable[[Handler], bool],
    scheme: str = "http",
    ends: tuple[int, ...] = (USAGE, DAMAGED, OTHER),
    keys: tuple[str, ...] = (),
    reports: tuple[int, ...] = (USAGE, DAMAGED, OTHER),
) -> Case:
    """Serve the cache from a server with a fault, as a web server or as S3; `reports`: if a command reads no shard."""
    location = "http://127.0.0.1:PORT/c.zarr" if scheme == "http" else "s3://bucket/c.zarr"
    commands = (
        ("inspect", "verify", "train") if scheme == "http" else ("inspect", "verify", "gc", "train", "precompute")
    )
    of_reports = dict.fromkeys(("inspect", "gc", "plan", "check", "card"), reports if ends != ANY else ends)
    every = {**dict.fromkeys(READERS, ends), **of_reports}
    return Case(
        "server" if not keys else "key",
        name,
        lambda folder: serving(folder, fault, keys),
        every,
        commands,
        READERS,
        location,
        4 * REQUEST_SECONDS,
    )


def at_root(reply: Reply, pattern: str = "c.zarr/zarr.json") -> Callable[[Handler], bool]:
    """Let a fault reply where the path holds a text."""

    def fault(handler: Handler) -> bool:
        if pattern not in handler.where or handler.command == "PUT":
            return False
        reply(handler)
        return True

    return fault


def _begin(handler: Handler, header: str, value: str) -> None:
    """Send the status and a header of a reply that succeeds."""
    handler.send_response(200)
    handler.send_header(header, value)
    handler.end_headers()


def endless(handler: Handler) -> None:
    """Send zeros for ever, without a length."""
    _begin(handler, "Connection", "close")
    handler.close_connection = True
    while handler.command != "HEAD":
        handler.wfile.write(bytes(1 << 20))


def chunked(handler: Handler) -> None:
    """Send chunks for ever."""
    _begin(handler, "Transfer-Encoding", "chunked")
    while handler.command != "HEAD":
        handler.wfile.write(b"100000\r\n" + bytes(1 << 20) + b"\r\n")


def lying(handler: Handler) -> None:
    """Declare 100 GB and send them."""
    _begin(handler, "Content-Length", str(100 << 30))
    while handler.command != "HEAD":
        handler.wfile.write(bytes(1 << 20))


def dripping(handler: Handler) -> None:
    """Send a byte every half second."""
    _begin(handler, "Content-Length", "1000")
    for _ in range(1000 if handler.command != "HEAD" else 0):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.5)


def dripping_headers(handler: Handler) -> None:
    """Send headers for ever."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        handler.wfile.write(b"X-A: b\r\n")
        handler.wfile.flush()
        time.sleep(0.2)


def zipped(handler: Handler) -> None:
    """Send a gzip bomb as a content encoding."""
    handler.send(200, BOMB, Content_Encoding="gzip")


def html(handler: Handler) -> None:
    """Answer with a page."""
    handler.send(200, b"<html>log in</html>", Content_Type="text/html")


def redirect(status: int, target: str) -> Reply:
    """Answer with a redirect; {trap} is the port of a server to which nobody should come."""
    return lambda handler: handler.send(status, Location=target.replace("TRAP", os.environ.get("TRAP", "1")))


def s3_redirect(status: int) -> Callable[[Handler], bool]:
    """Answer every request of S3 with a redirect to the second server."""

    def fault(handler: Handler) -> bool:
        if os.environ.get("TRAP") == str(handler.server.server_address[1]):
            handler.visits.write_text("PWNED")
            (handler.folder / "PWNED-by-redirect").write_text(str(handler.headers))
            handler.send(200)
            return True
        trap = os.environ["TRAP"]
        body = (
            f"<Error><Code>PermanentRedirect</Code><Endpoint>127.0.0.1:{trap}</Endpoint><Bucket>bucket</Bucket></Error>"
        )
        handler.send(
            status, body.encode(), Location=f"http://127.0.0.1:{trap}{handler.path}", Content_Type="application/xml"
        )
        return True

    return fault


def endless_listing(handler: Handler) -> bool:
    """List the same thousand keys for ever."""
    if "list-type" not in handler.path:
        return False
    when = "<LastModified>2026-01-01T00:00:00.000Z</LastModified>"
    keys = (f"<Key>c.zarr/t.logits/c.9.{number}.0</Key><Size>1</Size>{when}" for number in range(1000))
    rows = "".join(f"<Contents>{key}</Contents>" for key in keys)
    more = "<IsTruncated>true</IsTruncated><NextContinuationToken>again</NextContinuationToken>"
    handler.send(200, f"<ListBucketResult>{more}{rows}</ListBucketResult>".encode(), Content_Type="application/xml")
    return True


ANY = (OK, USAGE, DAMAGED, OTHER)
SERVERS = [
    server("a body without end", at_root(endless)),
    server("chunks without end", at_root(chunked)),
    server("100 GB", at_root(lying)),
    server("labels without end", at_root(endless, "label/c/0")),
    server("a byte every half second", at_root(dripping)),
    server("headers without end", at_root(dripping_headers)),
    server("a gzip bomb", at_root(zipped)),
    # Records that are none commit nothing: `inspect` and `plan` count their shards as missing, `gc` lists other files.
    server("records without end", at_root(endless, "commits/c."), reports=ANY),
    server("records of HTML", at_root(html, "commits/c."), reports=ANY),
    server("records of nothing", at_root(lambda h: h.send(200), "commits/c."), reports=ANY),
    server("shards of HTML", at_root(html, "t.logits/c."), ends=ANY),
    server("a redirect to itself", at_root(redirect(302, "/c.zarr/zarr.json"))),
    server("a redirect to file", at_root(redirect(301, "file:///etc/passwd"))),
    server("a redirect inside", at_root(redirect(307, "http://169.254.169.254/latest"))),
    server("a redirect to another host", at_root(redirect(308, "http://127.0.0.2:TRAP/x"))),
    server("S3 moved for good", s3_redirect(301), "s3"),
    server("S3 moved for now", s3_redirect(307), "s3"),
    server("S3 bodies without end", at_root(endless), "s3"),
    server("S3 lists without end", endless_listing, "s3", ends=(USAGE, DAMAGED, OTHER)),
    server("S3 records of HTML", at_root(html, "commits/c."), "s3", reports=ANY),
    server("S3 pages of nothing", at_root(lambda h: h.send(200)), "s3"),
    *(
        server(f"a key {number}", lambda handler: False, "s3", ANY, (f"c.zarr/{key}",))
        for number, key in enumerate(
            (
                "t.logits.commits/../../../../PWNED/c.0.0.0.0",
                "t.logits.commits/../../PWNED.c.0.0.0.0",
                "t.logits.commits//PWNED/c.0.0.0.0",
                "t.logits.commits/c.0.0.0.0/../../../../../PWNED",
                "t.logits.commits/\\..\\PWNED/c.0.0.0.0",
                "t.logits.commits/%2e%2e/%2e%2e/PWNED/c.0.0.0.0",
                "u.logits.commits/./../../../PWNED/c.1.0.0.0",
                "../PWNED/t.logits.commits/c.0.0.0.0",
            )
        )
    ),
]
