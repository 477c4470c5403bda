"""Files at URLs: against a dict as the model, on an emulator that fails, over HTTP, and from forked processes."""

import os
import pickle
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from fsspec.registry import _registry as registry

from logitcache.errors import LogitCacheError, MissingExtraError, RecipeError, RemoteError
from logitcache.store.remote import client
from logitcache.store.remote.client import Remote, is_remote
from logitcache.store.remote.failures import without_secrets
from tests.front import FAULTS
from tests.objects import KEY_ID, SECRET, Bucket, bucket, connecting, website
from tests.stage_one.apart import ended, forked

SECONDS = 20
"""Within which a request that fails for good is given up, also on a loaded machine."""

# Python 3.12 warns of every fork of a process with threads; the children below use none of their parent's.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture(scope="module")
def served() -> Iterator[Bucket]:
    with bucket(READ_SECONDS=20) as found:
        yield found


@pytest.fixture
def store(served: Bucket) -> Bucket:
    """A bucket whose front does as it should, and where nothing was asked yet."""
    served.front.fail(0)
    served.front.latency = served.front.most_at_once = 0
    served.front.seen.clear()
    return served


@pytest.fixture
def hasty(store: Bucket) -> Iterator[Bucket]:
    """The bucket, for which this process does not wait for long."""
    with connecting(store.environment, READ_SECONDS=0.3, ATTEMPTS=8):
        yield store


@pytest.fixture
def files(store: Bucket, request: pytest.FixtureRequest) -> Remote:
    """A folder of the bucket that no other test uses."""
    return Remote(f"{store.url}/{request.node.name.replace('[', '-').replace(']', '')}")


def below(files: Remote) -> str:
    """Return the name of a folder within its bucket."""
    return files.url.split("/", 3)[3]


class Model:
    """A dict that storage is compared with, step by step."""

    keys = ("zarr.json", "label/c/0", "a/c.0.0", "a/c.0.1", "a/b/c.1", "ab", "name with space+plus")

    def __init__(self, files: Remote, seed: int, *, conditional: bool) -> None:
        self.files, self.expected = files, dict[str, bytes]()
        self.random, self.conditional = random.Random(seed), conditional

    def step(self) -> None:
        key = self.random.choice(self.keys)
        self.random.choice((self.write, self.write_new, self.read, self.list, self.remove))(key)

    def data(self) -> bytes:
        return self.random.randbytes(self.random.choice((0, 1, 40, 3000)))

    def write(self, key: str) -> None:
        self.expected[key] = self.data()
        self.files.write(key, self.expected[key])

    def write_new(self, key: str) -> None:
        data, before = self.data(), self.expected.get(key)
        if not self.conditional:
            return
        try:
            self.files.write(key, data, new=True)
            assert before is None
        except FileExistsError:  # also after an attempt of which the answer was lost
            assert self.files.read(key) in (before, data if before is None else before)
        self.expected.setdefault(key, data)

    def read(self, key: str) -> None:
        data = self.expected.get(key)
        assert self.files.exists(key) == (data is not None)
        if data is None:
            for ask in (self.files.read, self.files.size):
                with pytest.raises(FileNotFoundError, match=re.escape(f"{self.files}/{key}")):
                    ask(key)
            return
        assert self.files.read(key) == data == self.files.read(key, len(data))
        assert self.files.size(key) == len(data)
        start = self.random.randrange(len(data) + 1)
        stop = self.random.randrange(start, len(data) + 1)
        assert self.files.read_range(key, start, stop) == data[start:stop]

    def list(self, key: str) -> None:
        assert {name: entry.size for name, entry in self.files.list().items()} == {
            name: len(data) for name, data in self.expected.items()
        }
        assert self.files.list("a").keys() == {name for name in self.expected if name.startswith("a/")}
        assert self.files.at("a").list().keys() == {name[2:] for name in self.expected if name.startswith("a/")}

    def remove(self, key: str) -> None:
        gone = {key, self.random.choice(self.keys)}
        self.files.remove(gone)
        for name in gone:
            self.expected.pop(name, None)


@pytest.mark.parametrize("fraction", [0, 0.05, 0.3])
def test_storage_answers_as_a_dict_does(fraction: float, hasty: Bucket, files: Remote) -> None:
    hasty.front.fail(fraction, seed=3)
    model = Model(files, 5, conditional=True)
    for _ in range(40):
        model.step()
    failed = {seen.fault for seen in hasty.front.asked(failed=True)}
    assert hasty.contents(below(files)) == model.expected
    assert failed == {0: set(), 0.3: set(FAULTS)}.get(fraction, failed)
    assert bool(failed) == bool(fraction)


def test_memory_answers_as_a_dict_does(tmp_path: Path) -> None:
    model = Model(Remote(f"memory://{tmp_path.name}/x.zarr"), 7, conditional=False)
    for _ in range(200):
        model.step()


def test_what_others_wrote_is_seen_at_once(store: Bucket, files: Remote) -> None:
    assert files.list() == {}
    store.put(f"{below(files)}/a", b"one")
    first = files.list()
    store.put(f"{below(files)}/a", b"two")
    second = files.list()
    assert files.read("a") == b"two"
    assert first["a"].size == second["a"].size == 3
    assert first["a"].tag != second["a"].tag


def test_a_listing_has_pages(store: Bucket, files: Remote) -> None:
    keys = [f"c.{number}" for number in range(1010)]
    store.fill(below(files), dict.fromkeys(keys, b""))
    assert sorted(files.list()) == sorted(keys)
    assert len(store.front.asked("GET")) == 2


def test_a_whole_file_is_one_request(store: Bucket, files: Remote) -> None:
    files.write("a", b"x" * 5000)
    files.read("a")
    files.read_range("a", 10, 20)
    with pytest.raises(FileNotFoundError):
        files.read("b")
    asked = [(seen.method, seen.span) for seen in store.front.asked()]
    assert asked == [("PUT", ""), ("GET", ""), ("GET", "bytes=10-19"), ("GET", "")]


@pytest.mark.parametrize("fraction", [0, 0.3])
def test_a_large_file_is_read_in_parts(
    fraction: float, store: Bucket, files: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "PART", 1000)
    data = random.Random(1).randbytes(7500)
    files.write("a", data)
    store.front.fail(fraction, "500", "cut", seed=1)
    assert files.read("a", len(data)) == data
    assert sorted(seen.sent for seen in store.front.asked("GET")) == [500, *[1000] * 7]
    assert bool(store.front.asked("GET", failed=True)) == bool(fraction)


@pytest.mark.parametrize("fault", FAULTS)
def test_storage_that_fails_for_good_is_given_up(fault: str, hasty: Bucket, files: Remote) -> None:
    files.write("a", b"data")
    hasty.front.fail(1, fault)
    began = time.monotonic()
    with pytest.raises(RemoteError, match=f"tried {client.ATTEMPTS} times") as found:
        files.read("a")
    assert time.monotonic() - began < SECONDS
    assert f"{files}/a" in str(found.value)
    assert "Fix: see that the storage answers" in str(found.value)
    # Where a connection ends that it kept, aiohttp asks once more by itself.
    assert len(hasty.front.asked(failed=True)) in range(
        client.ATTEMPTS, client.ATTEMPTS * (2 if fault == "cut" else 1) + 1
    )


@pytest.mark.parametrize("doing", ["size", "exists", "list", "write", "remove"])
def test_whatever_is_asked_of_failing_storage_ends(doing: str, store: Bucket, files: Remote) -> None:
    store.front.fail(1, "500")
    asked: dict[str, Callable[[], object]] = {
        "size": lambda: files.size("a"),
        "exists": lambda: files.exists("a"),
        "list": lambda: files.list("a"),
        "write": lambda: files.write("a", b""),
        "remove": lambda: files.remove(["a"]),
    }
    with pytest.raises(RemoteError, match=f"{files}/a: cannot .*tried 6 times"):
        asked[doing]()


def test_a_server_that_is_not_there_is_given_up() -> None:
    with bucket() as gone:
        gone.front.close()
        began = time.monotonic()
        with pytest.raises(RemoteError, match=f"{gone.url}/x: cannot read it, tried 6 times"):
            Remote(gone.url).read("x")
        assert time.monotonic() - began < SECONDS


def test_patience_ends_before_the_attempts(hasty: Bucket, files: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "PATIENCE", 0.4)
    hasty.front.fail(1, "silence")
    with pytest.raises(RemoteError, match=r"tried [12] times"):
        files.read("a")


def test_access_that_is_refused_is_not_asked_for_again(store: Bucket, files: Remote) -> None:
    store.front.fail(1, "403")
    for ask in (files.read, files.size, files.list):
        store.front.seen.clear()
        with pytest.raises(RemoteError, match=f"{files}/a: cannot"):
            ask("a")
        assert len(store.front.asked(failed=True)) == 1
    store.front.seen.clear()
    with pytest.raises(RemoteError, match=f"{files}/a: cannot write it"):
        files.write("a", b"")
    assert len(store.front.asked(failed=True)) == 1


def test_a_range_beyond_the_end_is_an_error_at_once(store: Bucket, files: Remote) -> None:
    files.write("a", b"0123456789")
    for start, stop in ((5, 15), (10, 20)):
        store.front.seen.clear()
        with pytest.raises(RemoteError, match=f"{files}/a"):
            files.read_range("a", start, stop)
        assert len(store.front.asked()) == 1


def test_a_bucket_that_is_not_there_is_named(store: Bucket) -> None:
    missing = Remote("s3://no-such-bucket/x.zarr")
    message = r"it: there is no such bucket, s3://no-such-bucket\. Fix: create it"
    asked = (missing.list, lambda: missing.exists("a"), lambda: missing.read("a"), lambda: missing.write("a", b""))
    for ask in asked:
        store.front.seen.clear()
        with pytest.raises(RemoteError, match=message):
            ask()
        assert len(store.front.asked()) <= 2  # none is asked again


@pytest.mark.parametrize("url", ["s3:///x.zarr", "http:///x"])
def test_a_url_names_a_bucket_or_a_server(url: str) -> None:
    with pytest.raises(RecipeError, match="names no bucket or server"):
        Remote(url)


def test_a_file_is_created_once(store: Bucket, files: Remote) -> None:
    files.write("zarr.json", b"first", new=True)
    with pytest.raises(FileExistsError):
        files.write("zarr.json", b"second", new=True)
    assert files.read("zarr.json") == b"first"
    assert len(store.front.asked("PUT")) == 2
    files.write("zarr.json", b"third")
    assert files.read("zarr.json") == b"third"


def test_a_creation_of_which_the_answer_is_lost_is_found_there(store: Bucket, files: Remote) -> None:
    store.front.fail(1, "cut", picked=lambda request: not store.front.asked("PUT", failed=True))
    with pytest.raises(FileExistsError):
        files.write("zarr.json", b"first", new=True)
    assert files.read("zarr.json") == b"first"


def test_each_keeps_the_order_and_bounds_the_requests(store: Bucket, files: Remote) -> None:
    keys = [f"c.{number}" for number in range(40)]
    for key in keys:
        store.put(f"{below(files)}/{key}", key.encode())
    store.front.latency, store.front.most_at_once = 0.05, 0
    with ThreadPoolExecutor(3) as pool:  # several readers of a process, too
        found = [pool.submit(lambda: list(files.each(files.read, keys))) for _ in range(3)]
    assert [future.result() for future in found] == [[key.encode() for key in keys]] * 3
    assert 8 <= store.front.most_at_once <= client.REQUESTS


def test_each_ends_with_the_first_error(store: Bucket, files: Remote) -> None:
    keys = [f"c.{number}" for number in range(200)]
    with pytest.raises(FileNotFoundError):
        list(files.each(files.read, keys))
    assert len(store.front.asked()) < 100
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("logitcache-remote")]
    assert not threads


@pytest.mark.parametrize("fault", ["403", "500"])
def test_no_secret_is_told(fault: str, store: Bucket, files: Remote) -> None:
    """The front tells what it was sent."""
    with connecting(store.environment | {"AWS_SESSION_TOKEN": "hidden-token"}):
        store.front.fail(1, fault)
        with pytest.raises(RemoteError, match="Credential=") as found:
            files.read("a")
    assert not any(secret in str(found.value) for secret in (KEY_ID, SECRET, "hidden-token"))


def test_no_secret_of_an_address_is_told() -> None:
    assert without_secrets(OSError("cannot reach https://me:hidden@example.org:9/x by\nme@it")) == (
        "cannot reach https://example.org:9/x by me@it"
    )


SECRETIVE = (
    "s3://AKIDX:sesame@bucket/x.zarr",
    "s3://AKIDX:open/sesame@bucket/x.zarr",
    "s3://AKIDX:open/s+esame/1@bucket/x/y.zarr",
    "http://sesame:x@127.0.0.1/x.zarr",
    "http://sesame@127.0.0.1/x.zarr",
    "https://example.org/x.zarr?token=sesame",
    "https://example.org/x.zarr?X-Amz-Signature=sesame@bucket",
    "https://example.org/x.zarr#sesame",
)


@pytest.mark.parametrize("url", SECRETIVE)
def test_a_url_with_credentials_is_refused(url: str) -> None:
    with pytest.raises(RecipeError, match="Fix: the plain URL") as found:
        Remote(url)
    assert not any(part in str(found.value) for part in ("open", "esame", "AKIDX"))
    assert "x.zarr" in str(found.value) or "y.zarr" in str(found.value)


def test_a_name_may_hold_what_credentials_end_with() -> None:
    assert Remote("s3://bucket/me@example.org/x.zarr").name == "x.zarr"
    assert Remote("https://example.org:8080/x@y.zarr/").url == "https://example.org:8080/x@y.zarr"


def test_a_location_is_remote_by_its_scheme() -> None:
    assert all(map(is_remote, ("s3://b/x.zarr", "HTTPS://h/x", "gs://b", "memory://x")))
    assert not any(map(is_remote, ("x.zarr", "/a/b", "./s3:/b", "C:\\x", "a b://c")))
    assert not is_remote(Path("s3://b/x.zarr"))


def test_it_is_pickled_without_its_connection(files: Remote) -> None:
    files.write("a", b"data")
    data = pickle.dumps(files)
    assert SECRET.encode() not in data
    assert pickle.loads(data).read("a") == b"data"
    assert pickle.loads(data).url == files.url


def test_a_forked_process_connects_by_itself(store: Bucket, files: Remote) -> None:
    files.write("a", b"data")
    assert ended(forked(lambda: 0 if files.read("a") == b"data" else 1), seconds=30) == 0
    assert files.read("a") == b"data"


def test_a_fork_amid_requests_can_ask_too(store: Bucket, files: Remote) -> None:
    files.write("a", b"data")
    store.front.latency = 0.3
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(lambda: list(files.each(files.read, ["a"] * 32)))
        while store.front.most_at_once < client.REQUESTS:
            time.sleep(0.01)
        child = forked(lambda: 0 if files.read("a") == b"data" else 1)
        assert set(reading.result()) == {b"data"}
    assert ended(child, seconds=30) == 0


def test_global_random_numbers_stay_as_they_are(store: Bucket, files: Remote) -> None:
    before = random.getstate()
    store.front.fail(1, "500")
    with suppress(RemoteError):
        files.read("a")
    assert random.getstate() == before


@pytest.mark.parametrize(("url", "module", "extra"), [("s3://b/x", "s3fs", "s3"), ("http://h/x", "aiohttp", "http")])
def test_a_missing_package_is_named(url: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_known", {})
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(registry, url.partition(":")[0], raising=False)
    with pytest.raises(MissingExtraError, match=rf"pip install 'logitcache\[{extra}\]'"):
        Remote(url).read("a")


def test_a_protocol_that_nobody_knows_is_an_error() -> None:
    with pytest.raises(RecipeError, match="nonsense://"):
        Remote("nonsense://x/y").read("a")


def site(root: Path) -> dict[str, bytes]:
    """Write some files."""
    made = {"zarr.json": b"{}", "a/c.0": bytes(range(256)) * 20, "a/empty": b"", "b c/+": b"x"}
    for name, data in made.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return made


@pytest.mark.parametrize("fraction", [0, 0.3])
def test_a_web_server_is_read(fraction: float, tmp_path: Path) -> None:
    made = site(tmp_path)
    with website(tmp_path, READ_SECONDS=0.3, PART=1000) as front:
        front.fail(fraction, seed=2)
        files = Remote(front.url)
        for name, data in made.items():
            assert files.read(name) == data == files.read(name, len(data))
            assert files.size(name) == len(data)
            assert files.exists(name)
            assert files.read_range(name, 0, len(data) // 2) == data[: len(data) // 2]
        for ask in (files.read, files.size):
            with pytest.raises(FileNotFoundError):
                ask("nothing")
        assert not files.exists("nothing")
        assert bool(front.asked(failed=True)) == bool(fraction)
        assert [seen.sent for seen in front.asked("GET", "c.0")].count(1000) == 5


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failing_web_server_is_not_an_absent_file(fault: str, tmp_path: Path) -> None:
    site(tmp_path)
    with website(tmp_path, READ_SECONDS=0.2, ATTEMPTS=3) as front:
        front.fail(1, fault)
        files = Remote(front.url)
        # Where an answer is cut, its head has come, and with it the size.
        asked: list[Callable[[str], object]] = [files.read, files.exists, files.size]
        for ask in asked[: 1 if fault == "cut" else 3]:
            with pytest.raises(RemoteError, match=f"{front.url}/zarr.json: cannot"):
                ask("zarr.json")


def test_a_web_server_that_refuses_is_asked_once(tmp_path: Path) -> None:
    site(tmp_path)
    with website(tmp_path) as front:
        front.fail(1, "403")
        with pytest.raises(RemoteError, match="403"):
            Remote(front.url).read("zarr.json")
        assert len(front.asked(failed=True)) == 1


def test_a_web_server_lists_and_takes_nothing(tmp_path: Path) -> None:
    site(tmp_path)
    with website(tmp_path) as front:
        files = Remote(front.url)
        assert not files.is_listable
        refused: list[Callable[[], object]] = [files.list, lambda: files.write("a", b""), lambda: files.remove(["a"])]
        for ask in refused:
            with pytest.raises(LogitCacheError, match="only"):
                ask()
        assert not front.seen
    assert os.listdir(tmp_path)
