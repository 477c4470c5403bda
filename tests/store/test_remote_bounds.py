"""Hostile storage: endless, slow, redirected and false answers are refused, within bounds of bytes and of time."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from multidict import CIMultiDict
from yarl import URL

from logitcache.errors import RecipeError, RemoteError
from logitcache.store.remote import client, s3, transfer, web
from logitcache.store.remote.client import Remote
from logitcache.store.remote.transfer import MAX_ANSWER_BYTES, MAX_ERROR_BYTES, VARIABLE, Refused
from tests.front import REDIRECTS, Answer, Front, Request
from tests.objects import Bucket, bucket, connecting, folder, website

DATA = bytes(range(256)) * 200
UNDERWAY = 24 << 20
"""Bytes that may be between a server and a client that hung up."""

SECONDS = 10
"""Within which two attempts of a tenth of a second end, also on a loaded machine."""


@pytest.fixture(scope="module")
def served() -> Iterator[Bucket]:
    with bucket(READ_SECONDS=20) as found:
        found.put("x/a", DATA)
        yield found


@pytest.fixture
def store(served: Bucket) -> Iterator[Bucket]:
    reset(served.front)
    yield served
    reset(served.front)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Front]:
    """A web server."""
    (tmp_path / "x").mkdir()
    (tmp_path / "x/a").write_bytes(DATA)
    with website(tmp_path, READ_SECONDS=20) as front:
        yield front


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Front]:
    """Another server, which records what it is asked for, and has the same files."""
    front = Front(folder(tmp_path))
    yield front
    front.close()


@pytest.fixture(params=["s3", "web"])
def place(request: pytest.FixtureRequest) -> tuple[Remote, Front]:
    """A folder in storage, and the server that it is on."""
    if request.param == "s3":
        store: Bucket = request.getfixturevalue("store")
        return Remote(f"{store.url}/x"), store.front
    front: Front = request.getfixturevalue("site")
    return Remote(f"{front.url}/x"), front


def reset(front: Front) -> None:
    front.fail(0)
    front.seen.clear()
    front.streamed, front.headers, front.location = 0, {}, lambda request: request.target


def doings(files: Remote) -> dict[str, Callable[[], object]]:
    """List what can be asked of storage; a web server only reads."""
    reading: dict[str, Callable[[], object]] = {
        "read": lambda: files.read("a"),
        "range": lambda: files.read_range("a", 100, 200),
        "size": lambda: files.size("a"),
    }
    if not files.is_listable:
        return reading
    return reading | {
        "list": files.list,
        "write": lambda: files.write("b", b"data"),
        "create": lambda: files.write("b", b"data", new=True),
        "remove": lambda: files.remove(["a"]),
    }


@pytest.mark.parametrize(
    ("doing", "fault", "bound"),
    [
        ("read", "endless", MAX_ANSWER_BYTES),
        ("range", "endless", 100),
        ("list", "endless", MAX_ANSWER_BYTES),
        ("write", "endless", MAX_ANSWER_BYTES),
        ("read", "endless error", MAX_ERROR_BYTES),
        ("list", "endless error", MAX_ERROR_BYTES),
        ("size", "endless head", 1 << 20),
        ("read", "endless head", 1 << 20),
    ],
)
def test_an_endless_answer_is_not_read_on(doing: str, fault: str, bound: int, place: tuple[Remote, Front]) -> None:
    files, front = place
    ask = doings(files).get(doing)
    if ask is None:
        return  # a web server is only read
    front.fail(1, fault)
    with connecting({VARIABLE: "5"}, ATTEMPTS=1), pytest.raises(RemoteError, match=f"{files}"):
        ask()
    assert front.asked(failed=True)
    assert front.streamed <= bound + UNDERWAY


@pytest.mark.parametrize("fault", ["drip", "drip head"])
def test_an_answer_that_drips_is_given_up(
    fault: str, place: tuple[Remote, Front], monkeypatch: pytest.MonkeyPatch
) -> None:
    files, front = place
    assert files.exists("a")  # it is connected to
    front.fail(1, fault)
    monkeypatch.setattr(client, "PATIENCE", 0.15)
    monkeypatch.setenv(VARIABLE, "0.1")
    # Of a drip the head comes at once, and with it the size, and that a web server knows no ranges.
    at_once = {"size", "range"} if fault == "drip" else set()
    for ask in [ask for name, ask in doings(files).items() if name not in at_once]:
        began = time.monotonic()
        with pytest.raises(RemoteError, match=r"tried [12] times"):
            ask()
        assert time.monotonic() - began < SECONDS


def test_an_answer_may_take_longer_the_more_bytes_it_has(
    place: tuple[Remote, Front], monkeypatch: pytest.MonkeyPatch
) -> None:
    files, front = place
    assert files.exists("a")  # it is connected to
    monkeypatch.setenv(VARIABLE, "0.2")  # seven slices take longer
    monkeypatch.setattr(transfer, "LOWEST_RATE", 16 << 10)
    front.fail(1, "slow")
    began = time.monotonic()
    assert files.read("a") == DATA
    assert time.monotonic() - began > 0.2


@pytest.mark.parametrize("given", ["much", "0", "-1", "nan", "inf", ""])
def test_seconds_that_are_none_are_refused(given: str, store: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, given)
    with pytest.raises(RecipeError, match=f"{VARIABLE} is .*no number of seconds. Fix: a number such as 30"):
        Remote(store.url).read("x/a")
    monkeypatch.setenv(VARIABLE, "30")
    assert Remote(store.url).read("x/a") == DATA


@pytest.mark.parametrize("status", REDIRECTS)
def test_credentials_and_writes_stay_with_the_endpoint(status: str, store: Bucket, other: Front) -> None:
    files = Remote(f"{store.url}/x")
    store.front.location = lambda request: f"{other.url}{request.target}"
    store.front.headers = {"x-amz-bucket-region": "eu-west-1"}
    with connecting(store.environment | {"AWS_SESSION_TOKEN": "hidden"}):
        store.front.fail(1, status)
        # Of the redirects that botocore treats alike, all requests meet one, reads and writes meet the others.
        asked = doings(files) if status in ("300", "301", "307") else {"read", "write"}
        for ask in [ask for name, ask in doings(files).items() if name in asked]:
            store.front.seen.clear()
            # botocore cannot parse 300, and looks for the region of the bucket at the endpoint itself.
            redirects = rf": the storage redirects \({status}\) to .*AWS_ENDPOINT_URL"
            with pytest.raises(RemoteError, match=rf"cannot \w+ it({', tried 6' if status == '300' else redirects})"):
                ask()
            assert len(store.front.seen) <= 6
    assert other.seen == []


@pytest.mark.parametrize(
    ("code", "details"),
    [
        ("PermanentRedirect", "<Endpoint>{host}</Endpoint><Bucket>x</Bucket>"),
        ("AuthorizationHeaderMalformed", "<Region>evil.example.org/</Region>"),
        ("IllegalLocationConstraintException", "<Region>{host}</Region>"),
    ],
)
def test_an_error_that_names_another_place_leads_nowhere(code: str, details: str, other: Front, tmp_path: Path) -> None:
    host = other.url.removeprefix("http://")
    text = f"<Error><Code>{code}</Code><Message>m</Message>{details.format(host=host)}</Error>".encode()
    status = 301 if "Redirect" in code else 400
    front = Front(lambda request: Answer(status, {"x-amz-bucket-region": host}, text, len(text)))
    with connecting(credentials(front), ATTEMPTS=2):
        for ask in doings(Remote("s3://bucket/x")).values():
            with pytest.raises(RemoteError, match="s3://bucket/x"):
                ask()
    assert other.seen == []
    front.close()


def credentials(front: Front) -> dict[str, str]:
    access = {"AWS_ACCESS_KEY_ID": "A", "AWS_SECRET_ACCESS_KEY": "B", "AWS_DEFAULT_REGION": "us-east-1"}
    return access | {"AWS_ENDPOINT_URL": front.url, "AWS_EC2_METADATA_DISABLED": "true"}


class Recorded:
    """aiohttp's answer, as storage of AWS gives it: the bucket is in another region."""

    def __init__(self, url: str, region: str) -> None:
        self.status, self.url = 301, url
        self.headers = {"x-amz-bucket-region": region, "Content-Length": "0"}
        self.raw_headers = tuple((name.encode(), value.encode()) for name, value in self.headers.items())
        self.content = SimpleNamespace(read=self.read)

    async def read(self, amount: int = -1) -> bytes:
        return b""

    def close(self) -> None:
        """Nothing is open."""


@pytest.mark.parametrize(
    ("region", "hosts"),
    [
        ("eu-west-1", ["s3.us-east-1.amazonaws.com", "s3.eu-west-1.amazonaws.com"]),
        ("cn-north-1", ["s3.us-east-1.amazonaws.com"]),
        ("us-gov-west-1", ["s3.us-east-1.amazonaws.com"]),
    ],
)
def test_a_bucket_is_followed_within_its_partition(
    region: str, hosts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    async def send(self: Any, request: Any) -> Any:
        from aiobotocore.awsrequest import AioAWSResponse  # type: ignore[import-untyped]

        asked.append(URL(request.url).host or "")
        answer = s3._Answer(Recorded(request.url, region))  # type: ignore[arg-type]
        return AioAWSResponse(request.url, 301, {"x-amz-bucket-region": region}, answer)

    monkeypatch.setattr(s3.AIOHTTPSession, "send", send)
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    keys = {"AWS_ACCESS_KEY_ID": "A", "AWS_SECRET_ACCESS_KEY": "B", "AWS_DEFAULT_REGION": "us-east-1"}
    with connecting(keys | {"AWS_EC2_METADATA_DISABLED": "true"}):
        for _ in range(2):  # botocore remembers the region
            with pytest.raises(RemoteError, match="cannot read it: the storage redirects"):
                Remote("s3://bucket/x").read("a")
    expected = {f"bucket.{host}".replace("s3.us-east-1.", "s3.") for host in hosts}
    assert {host.replace("s3.us-east-1.", "s3.") for host in asked} == expected


@pytest.mark.parametrize("status", ["301", "302", "303", "307", "308"])
def test_a_web_server_may_redirect_reads(status: str, site: Front, other: Front) -> None:
    files = Remote(f"{site.url}/x")
    site.location = lambda request: f"{other.url}{request.target}"
    site.fail(1, status)
    assert files.read("a") == DATA
    assert files.read_range("a", 100, 200) == DATA[100:200]
    assert files.entry("a").size == len(DATA)
    assert {seen.method for seen in other.seen} == {"GET", "HEAD"}
    assert [seen.span for seen in other.asked("GET")] == ["", "bytes=100-199"]


def test_a_redirect_may_be_relative(site: Front) -> None:
    site.location = lambda request: "../x/a"
    site.fail(1, "302", picked=lambda request: "/y/" in request.target)
    assert Remote(f"{site.url}/y").read("b") == DATA


@pytest.mark.parametrize(
    ("location", "why"),
    [
        ("{same}", "redirects more than 5 times"),
        ("ftp://127.0.0.1/a", "from http:// to ftp://"),
        ("file:///etc/passwd", "from http:// to file://"),
        ("http://me:sesame@127.0.0.1:9/a", "with credentials"),
        ("https://me@127.0.0.1:9/a", "with credentials"),
        ("http://[::1", "address that is none"),
    ],
)
def test_a_redirect_that_is_less_safe_is_refused_at_once(location: str, why: str, site: Front) -> None:
    site.location = lambda request: location.format(same=request.target)
    site.fail(1, "307")
    with pytest.raises(RemoteError, match=why) as found:
        Remote(f"{site.url}/x").read("a")
    assert "sesame" not in str(found.value)
    assert len(site.seen) == (6 if location == "{same}" else 1)


@pytest.mark.parametrize("status", ["300", "304", "305", "306"])
def test_other_redirects_of_a_web_server_are_errors(status: str, tmp_path: Path) -> None:
    front = Front(lambda request: Answer(int(status), {"Location": "/y"}, b"", 0))
    with connecting({}), pytest.raises(RemoteError, match=f"the server answers {status}"):
        Remote(front.url).read("x")
    assert len(front.seen) == 1
    front.close()


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "2130706433", "0x7f000001"])
def test_a_public_server_does_not_lead_to_a_private_address(
    name: str, site: Front, other: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def public(url: URL) -> bool:
        return True

    monkeypatch.setattr(web, "_is_public", public)
    site.location = lambda request: f"{other.url.replace('127.0.0.1', name)}{request.target}"
    site.fail(1, "302")
    with connecting({}, ATTEMPTS=2):  # what is no canonical address may be tried again
        for ask in doings(Remote(f"{site.url}/x")).values():
            with pytest.raises(RemoteError, match=r"redirects to .* (public|is none)|is not a canonical IPv4 address"):
                ask()
    assert other.seen == []


@pytest.mark.parametrize("host", ["169.254.169.254", "10.0.0.1", "192.168.1.1", "[fe80::1]", "localhost", "127.0.0.2"])
def test_a_private_server_leads_to_no_other_private_address(host: str, site: Front, other: Front) -> None:
    site.location = lambda request: f"{other.url.replace('127.0.0.1', host)}{request.target}"
    site.fail(1, "302")
    for ask in doings(Remote(f"{site.url}/x")).values():
        with pytest.raises(RemoteError, match=r"redirects to .* public"):
            ask()
    assert other.seen == []


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1::1", True),
        ("example.org", True),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:127.0.0.1", False),
    ],
)
def test_addresses_are_public_or_not(address: str, public: bool) -> None:
    assert web._is_public_literal(address) == public


@pytest.mark.parametrize("location", ["http://example.org/a", "http://127.0.0.1/a", "HTTP://example.org/a"])
def test_https_does_not_lead_to_http(location: str) -> None:
    response: Any = SimpleNamespace(headers=CIMultiDict({"Location": location}))
    with pytest.raises(Refused, match="from https:// to http://"):
        web._target(URL("https://example.org/x"), response)
    response.headers["Location"] = "https://cdn.example.org/a?signature=1#part"
    assert web._target(URL("https://example.org/x"), response) == URL("https://cdn.example.org/a?signature=1")


def test_an_answer_that_is_shorter_than_asked_for_is_an_error(place: tuple[Remote, Front]) -> None:
    files, front = place
    for fault, count in (("short", 50), ("empty", 0)):
        front.fail(1, fault)
        with pytest.raises(RemoteError, match=f"{files}/a: {count} bytes where 100 were asked for: it is being"):
            files.read_range("a", 100, 200)
        with pytest.raises(RemoteError, match=r"bytes where|Expected checksum"):  # which S3 has of whole objects
            files.read("a", len(DATA))


def test_a_server_that_sends_another_part_is_refused(site: Front) -> None:
    whole = site._origin
    site._origin = lambda request: whole(request)._replace(headers={"Content-Range": "bytes 0-99/51200"})
    with pytest.raises(RemoteError, match="does not hand out parts of a file"):
        Remote(f"{site.url}/x").read_range("a", 100, 200)


def test_a_server_without_ranges_is_refused_and_a_whole_file_of_it_is_read(site: Front) -> None:
    whole = site._origin
    site._origin = lambda request: whole(request._replace(headers={}))
    files = Remote(f"{site.url}/x")
    assert files.read_range("a", 0, len(DATA)) == DATA
    for start in (0, 100):
        with pytest.raises(RemoteError, match="does not hand out parts of a file"):
            files.read_range("a", start, start + 100)


def test_an_answer_that_is_compressed_is_refused(site: Front) -> None:
    site.fail(1, "gzip")
    with pytest.raises(RemoteError, match=r"compressed \(Content-Encoding\). Fix:"):
        Remote(f"{site.url}/x").read("a")
    with pytest.raises(RemoteError, match="does not state its number of bytes"):
        Remote(f"{site.url}/x").entry("a")


@pytest.mark.parametrize("fault", ["412"])
def test_a_failed_condition_is_an_existing_file_or_an_error(fault: str, store: Bucket) -> None:
    files = Remote(f"{store.url}/x")
    store.front.fail(1, fault)
    with pytest.raises(FileExistsError):
        files.write("a", b"other", new=True)
    for ask in (lambda: files.write("a", b"other"), lambda: files.read("a")):
        store.front.seen.clear()
        with pytest.raises(RemoteError, match="cannot"):
            ask()
        assert len(store.front.seen) == 1
    assert store.get("x/a") == DATA


@pytest.mark.parametrize("date", ["yesterday", "Wed, 99 Oct 9999 99:99:99 GMT", "Mon, 01 Jan 0001 00:00:00 GMT"])
def test_a_date_that_is_none_is_no_tag(date: str, site: Front) -> None:
    whole = site._origin
    site._origin = lambda request: whole(request)._replace(headers={"Last-Modified": date})
    assert Remote(f"{site.url}/x").entry("a") in ((len(DATA), ""), (len(DATA), date))


def listing(keys: list[str], token: str = "") -> Answer:
    """Return a page of a listing as S3 words it."""
    files = "".join(f"<Contents><Key>{key}</Key><Size>1</Size><ETag>e</ETag></Contents>" for key in keys)
    more = f"<IsTruncated>true</IsTruncated><NextContinuationToken>{token}</NextContinuationToken>" if token else ""
    text = f"<ListBucketResult><Name>bucket</Name>{more}{files}</ListBucketResult>".encode()
    return Answer(200, {"Content-Type": "application/xml"}, text, len(text))


def endless(request: Request) -> Answer:
    number = request.target.partition("continuation-token=")[2].partition("&")[0] or "0"
    return listing([f"x/{number}-{n}" for n in range(100)], str(int(number) + 1))


LISTINGS: dict[str, tuple[Callable[[Request], Answer], str]] = {
    "without an end": (endless, "its listing does not end"),
    "of empty pages": (lambda request: listing([], f"{time.monotonic_ns()}"), "not end"),
    "of one page": (lambda request: listing(["x/a"], "same"), "the same page again"),
    "of other keys": (lambda request: listing(["x/a", "y/b"]), "which is not below"),
    "of keys that climb": (lambda request: listing(["../../x/a"]), "which is not below"),
}


@pytest.mark.parametrize("case", LISTINGS)
def test_a_listing_that_cannot_be_is_refused(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    origin, why = LISTINGS[case]
    monkeypatch.setattr(client, "LISTED", 1000)
    front = Front(origin)
    with (
        connecting(credentials(front), PATIENCE=0.1 if "empty" in case else 60),
        pytest.raises(RemoteError, match=f"s3://bucket/x.*{why}"),
    ):
        Remote("s3://bucket/x").list()
    front.close()


def test_a_folder_is_listed_page_by_page_and_each_page_is_retried(
    store: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "60")
    keys = {f"c.{number}": b"" for number in range(100)}
    store.fill("pages", keys | {"": b""})  # an empty object that marks the folder
    came: list[str] = []

    def once(request: Request) -> bool:
        came.append(request.target)
        return len(came) % 2 == 1

    store.front.fail(1, "500", picked=once)
    assert sorted(Remote(f"{store.url}/pages").list()) == sorted(keys)
    assert len(store.front.asked("GET")) == 2
    assert json.dumps(sorted(Remote(f"{store.url}/pages/c.7").list())) == '[""]'
