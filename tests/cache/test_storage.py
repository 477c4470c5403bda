"""A cache at a URL is what the same cache in a folder is, object by object and row by row."""

import json
import pickle
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial as bound
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from logitcache.cache.cache import Cache, open_cache
from logitcache.cache.format.manifest import Manifest
from logitcache.cache.format.root import GROWING
from logitcache.cache.snapshot import locate, open_snapshot
from logitcache.cache.verify import row_shards
from logitcache.cache.write.gc import collect
from logitcache.cache.write.writer_locks import creating
from logitcache.cli.app import main
from logitcache.errors import CacheError, RecipeError
from logitcache.report.inspect import inspect_cache
from logitcache.report.summary import summarize
from logitcache.report.verify_and_repair import verify
from logitcache.stage_one.claims import parse_part
from logitcache.stage_one.precompute import precompute
from logitcache.store.base import Store
from logitcache.store.mirrors_folder import FOLDER, SIZE
from logitcache.store.remote.client import Remote
from logitcache.store.shards import Shard
from logitcache.views.keys import ViewKey
from tests.cache.elsewhere import bytes_here, change, flipped, new_url, objects, shards_here, upload
from tests.cache.made import (
    DENSE16,
    FLIP_AND_CROP,
    PACKED,
    TOP2,
    TOP2_PACKED,
    Linear,
    Pixels,
    contents,
    raw,
    recipe,
    run,
    teacher,
)
from tests.stage_one.runs import NUM_IMAGES, partial
from tests.student import small

SHARD = "t.logits/c.0.1.0"


@pytest.fixture(autouse=True)
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the copies of each test."""
    monkeypatch.setenv(FOLDER, str(tmp_path / "copies"))
    return tmp_path / "copies"


@pytest.fixture
def url(sound: Path) -> str:
    """The sound cache, in storage."""
    url = new_url()
    upload(sound, url)
    return url


def fill(url: str | Path, images: object | None = None, **changes: Any) -> Any:
    return run(
        Path(url) if isinstance(url, Path) else url, images or Pixels(NUM_IMAGES), **({"shard_rows": 128} | changes)
    )  # type: ignore[arg-type]


def every_key(cache: Cache, view: int | None = None) -> list[ViewKey]:
    views = range(cache.num_views) if view is None else [view]
    return [ViewKey(view, index) for view in views for index in range(len(cache))]


def same_answers(one: Cache, other: Cache) -> bool:
    keys = every_key(one)
    mine, theirs = (raw(cache.answers(keys)["t"].compact) for cache in (one, other))
    return all(np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("logits", [DENSE16, TOP2_PACKED], ids=lambda entry: "-".join(map(str, entry.values())))
def test_a_cache_at_a_url_has_the_objects_and_the_rows_of_one_in_a_folder(
    logits: dict[str, Any], tmp_path: Path
) -> None:
    url, local = new_url(), tmp_path / "c.zarr"
    changes = {"teachers": {"t": teacher(logits)}, "row_checksums": True, "record_parameters": True}
    found = fill(url, **changes)
    assert (found.cache, found.shards_written, found.shards_left) == (url, 6, 0)
    fill(local, **changes)
    assert objects(url) == contents(local)
    assert found.bytes == sum(map(len, contents(local).values()))
    cache, other = open_cache(url), open_cache(local)
    assert same_answers(cache, other)
    keys = every_key(cache)
    assert np.array_equal(cache.row_checksums(keys), other.row_checksums(keys))  # type: ignore[arg-type]
    assert np.array_equal(cache.parameters(keys), other.parameters(keys))  # type: ignore[arg-type]
    assert fill(url, **changes).shards_written == 0


def test_a_run_that_ended_early_is_continued_by_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = new_url()
    partial(url)  # type: ignore[arg-type]
    with pytest.raises(CacheError, match=re.escape(f"{url} is incomplete: 5 of 6")):
        open_cache(url)
    monkeypatch.setenv(FOLDER, str(tmp_path / "other machine"))
    assert fill(url).shards_written == 5
    fill(tmp_path / "c.zarr")
    assert objects(url) == contents(tmp_path / "c.zarr")


def test_parts_on_two_machines_make_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = new_url()
    for number in (1, 2):
        monkeypatch.setenv(FOLDER, str(tmp_path / f"machine {number}"))
        plan = recipe(url, shard_rows=128)  # type: ignore[arg-type]
        found = precompute(plan, teachers={"t": Linear()}, dataset=Pixels(NUM_IMAGES), part=f"{number}/2")
        assert (found.shards_written, found.shards_left) == (3, 3 if number == 1 else 0)
    fill(tmp_path / "c.zarr")
    assert objects(url) == contents(tmp_path / "c.zarr")
    assert parse_part("1/2") == (1, 2)


def grown(cache: object, module: torch.nn.Module | None = None) -> None:
    views = {"num_views": 3, "seed": 3, "augmentations": FLIP_AND_CROP}
    plan = recipe(cache, views=views, teachers={"t": teacher(), "u": teacher(TOP2_PACKED)}, shard_rows=128)  # type: ignore[arg-type]
    precompute(plan, teachers={"t": Linear(), "u": module or Linear(seed=1)}, dataset=Pixels(NUM_IMAGES))


def test_views_and_teachers_are_added_as_in_a_folder(cache: Path, url: str) -> None:
    reader = open_cache(url)
    before = reader.answers(every_key(reader))["t"].logits
    grown(cache)
    grown(url)
    assert objects(url) == contents(cache)
    assert GROWING not in objects(url)
    assert torch.equal(reader.answers(every_key(reader))["t"].logits, before)  # type: ignore[arg-type]
    assert open_cache(url).num_views == 3


@pytest.mark.parametrize(
    ("key", "edit", "said"),
    [
        (SHARD, flipped, "its bytes differ from its record"),
        (SHARD, lambda data: data[:-1], "4115 bytes, its record states 4116 bytes"),
        (SHARD, None, "no regular file, its record states"),
        ("t.logits.commits/c.0.1.0.0", lambda data: data[:5], "the commit record"),
        ("t.logits.commits/c.0.1.0.0", None, "not committed"),
        ("label/c/0", flipped, "its values differ from the manifest's digest"),
        ("canary/c/0/0/0/0", None, "cannot be read"),
        ("t.logits/zarr.json", lambda data: data[:9], "is damaged"),
    ],
)
def test_damage_in_storage_is_found_by_verify_and_mended_by_precompute(
    key: str, edit: Callable[[bytes], bytes] | None, said: str, url: str, sound: Path
) -> None:
    open_cache(url)  # its copy is sound
    if edit is None:
        Remote(url).remove([key])
    else:
        change(url, key, edit)
    [problem] = verify(url).problems
    assert said in problem
    assert "copies" not in problem
    fill(url)
    assert objects(url) == contents(sound)
    assert verify(url).problems == ()


@pytest.mark.parametrize(
    "logits", [DENSE16, PACKED, TOP2, TOP2_PACKED], ids=lambda entry: "-".join(map(str, entry.values()))
)
def test_verify_keeps_nothing_of_the_shards(
    logits: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = new_url()
    fill(url, teachers={"t": teacher(logits)})
    monkeypatch.setenv(FOLDER, str(tmp_path / "other machine"))
    assert verify(url).problems == ()
    assert shards_here(tmp_path / "other machine") == []


@pytest.mark.parametrize("key", ["label/c/0", "t.logits/zarr.json", "digest/c/0"])
def test_a_file_that_is_larger_in_storage_is_found_by_verify_and_written_again_by_precompute(
    key: str, url: str, sound: Path
) -> None:
    open_cache(url)  # its copy is sound
    change(url, key, lambda data: data.ljust(17 << 20))
    problems = verify(url).problems
    assert problems
    assert any(f"{url}/{key}" in problem for problem in problems)
    fill(url)
    assert objects(url) == contents(sound)


def test_a_shard_that_is_damaged_in_storage_is_refused_before_its_rows_are_given(url: str) -> None:
    change(url, SHARD, flipped)
    cache = open_cache(url)
    with pytest.raises(CacheError, match=rf"(?s){url} is damaged: .*rows 128\.\.256.*verify {url} --repair"):
        cache.answers([ViewKey(0, 0)])
    assert len(cache.answers([ViewKey(1, 0)])) == 1
    Remote(url).remove([SHARD])
    with pytest.raises(CacheError, match="is not there"):
        open_cache(url).answers([ViewKey(0, 0)])


def test_a_record_that_claims_absurd_sizes_is_refused(url: str) -> None:
    change(url, "t.logits.commits/c.0.1.0.0", lambda data: b"\xff" * 7 + data[7:])
    with pytest.raises(CacheError, match=r"(?s)rows 128\.\.256: the commit record .* states other sizes"):
        open_cache(url)
    snapshot = open_snapshot(url)
    with pytest.raises(CacheError, match=r"view 0 rows 128\.\.256: the commit record .* is damaged"):
        row_shards(snapshot, snapshot.layout.groups, [Shard(0, 128, 256)])


def test_what_was_damaged_on_the_way_is_read_once_more(url: str, sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, seen = Remote.read_range, []

    def once_flipped(self: Remote, key: str, start: int, stop: int) -> bytes:
        found = read(self, key, start, stop)
        seen.append(key)
        return flipped(found) if key == SHARD and seen.count(key) == 1 else found

    monkeypatch.setattr(Remote, "read_range", once_flipped)
    assert same_answers(open_cache(url), open_cache(sound))
    assert seen.count(SHARD) == 2


def test_a_copy_that_is_damaged_or_lacks_files_is_mended_from_the_storage(url: str, sound: Path) -> None:
    cache = open_cache(url)
    assert same_answers(cache, open_cache(sound))
    for key in (SHARD, "label/c/0", "t.logits.commits/c.1.0.0.0"):
        (cache.path / key).write_bytes(flipped((cache.path / key).read_bytes(), 3))
    (cache.path / "t.logits/zarr.json").unlink()
    (cache.path / "t.logits.commits/c.1.1.0.0").unlink()
    assert same_answers(open_cache(url), open_cache(sound))
    # Who reads answers needs no shards of errors.
    assert contents(cache.path) == {
        key: data for key, data in contents(sound).items() if not key.startswith("t.logits.errors/c.")
    }


def test_a_copy_that_is_removed_under_a_run_is_made_again(url: str, copies: Path, sound: Path) -> None:
    cache = open_cache(url)
    cache.answers([ViewKey(0, 0)])
    time.sleep(0.1)
    shutil.rmtree(copies, ignore_errors=True)
    assert same_answers(cache, open_cache(sound))
    assert np.array_equal(cache.labels, open_cache(sound).labels)


def test_what_the_storage_no_longer_has_is_gone_from_the_copy(url: str) -> None:
    cache = open_cache(url)
    cache.answers(every_key(cache))
    record = "t.logits.commits/c.0.1.0.0"
    Remote(url).remove([record])
    with pytest.raises(CacheError, match="1 of 6 shards are not committed"):
        open_cache(url)
    Remote(url).remove(objects(url))
    with pytest.raises(CacheError, match=f"{url} does not exist"):
        open_cache(url)
    assert not cache.path.exists()


def test_another_cache_at_the_same_url_is_read_in_place_of_the_first(url: str, tmp_path: Path) -> None:
    open_cache(url).answers([ViewKey(0, 0)])
    Remote(url).remove(objects(url))
    fill(tmp_path / "other.zarr", Pixels(NUM_IMAGES, seed=5))
    upload(tmp_path / "other.zarr", url)
    assert same_answers(open_cache(url), open_cache(tmp_path / "other.zarr"))


def test_a_shard_is_brought_once_and_only_when_its_view_is_read(
    url: str, copies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, seen = Remote.read_range, []

    def counted(self: Remote, key: str, start: int, stop: int) -> bytes:
        seen.append(key)
        return read(self, key, start, stop)

    monkeypatch.setattr(Remote, "read_range", counted)
    monkeypatch.setattr("logitcache.store.download.Prefetcher.start", lambda self, shards: list(shards))
    cache = open_cache(url)
    assert shards_here(copies) == []
    threads = [threading.Thread(target=cache.answers, args=[every_key(cache, 0)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(key for key in seen if "commits" not in key) == [f"t.logits/c.0.{n}.0" for n in range(3)]


def test_the_next_view_is_brought_while_one_is_read(url: str, copies: Path) -> None:
    cache = open_cache(url)
    cache.answers([ViewKey(0, 0)])
    deadline = time.monotonic() + 20
    while len(shards_here(copies)) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(shards_here(copies)) == 6


def long(url: str, logits: dict[str, Any] = DENSE16) -> None:
    """Fill a cache of five views of three shards, of about 4 kB each where they are hot."""
    views = {"num_views": 5, "seed": 3, "augmentations": FLIP_AND_CROP}
    run(url, Pixels(NUM_IMAGES), views=views, teachers={"t": teacher(logits)}, shard_rows=128)  # type: ignore[arg-type]


def deleted_mappings(folder: Path) -> int:
    """Count the files below a folder that are gone, and still take their place on the disk as they are mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sum(str(folder) in line and line.endswith("(deleted)") for line in lines)


@pytest.mark.parametrize("logits", [DENSE16, PACKED], ids=["hot", "packed"])
def test_copies_take_no_more_than_they_may(
    logits: dict[str, Any], copies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, limit = new_url(), 40_000  # of three views
    long(url, logits)
    first = open_cache(url)
    whole = [raw(first.answers(every_key(first, view))["t"].compact) for view in range(5)]
    monkeypatch.setenv(FOLDER, str(tmp_path / "small"))
    monkeypatch.setenv(SIZE, str(limit))
    cache = open_cache(url)
    for view in [*range(5), 0, 3]:
        found = raw(cache.answers(every_key(cache, view))["t"].compact)
        assert np.array_equal(found[0], whole[view][0])
        here = bytes_here(tmp_path / "small")
        assert here <= limit
        assert deleted_mappings(tmp_path / "small") <= 6


def test_packed_shards_come_one_by_one_where_a_view_has_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = new_url()
    long(url, PACKED)
    largest = max(len(data) for key, data in objects(url).items() if key.startswith("t.logits/c."))
    cache = open_cache(url)
    expected = raw(cache.answers(every_key(cache))["t"].compact)[0]
    monkeypatch.setenv(FOLDER, str(tmp_path / "small"))
    monkeypatch.setenv(SIZE, str(largest))
    cache = open_cache(url)
    assert np.array_equal(raw(cache.answers(every_key(cache))["t"].compact)[0], expected)
    assert bytes_here(tmp_path / "small") <= largest


def test_a_view_that_cannot_be_mapped_within_the_limit_is_refused_with_what_it_needs(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SIZE, "20000")
    cache = open_cache(url)
    with pytest.raises(CacheError, match=r"the next is brought while one is read.*LOGITCACHE_LOCAL_COPY_SIZE=2\d{4} "):
        cache.answers([ViewKey(0, 0)])
    monkeypatch.setenv(SIZE, "much")


def test_a_size_that_is_none_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SIZE, "much")
    with pytest.raises(RecipeError, match=f"{SIZE} is 'much', which is no size"):
        open_cache(url)


def test_nothing_is_overwritten_where_there_is_no_cache() -> None:
    url = new_url()
    Remote(url).write("thesis.txt", b"years of work")
    with pytest.raises(CacheError, match=r"holds 1 objects that are of no cache, such as thesis\.txt"):
        fill(url)
    assert objects(url) == {"thesis.txt": b"years of work"}


@pytest.mark.parametrize("same", [True, False])
def test_of_two_machines_that_create_a_cache_the_second_continues_that_of_the_first_or_is_refused(
    same: bool, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, begun = new_url(), tmp_path / "begun.zarr"
    partial(begun)
    created_meanwhile(begun, url, monkeypatch)
    if same:
        assert fill(url).shards_written == 5
        assert objects(url) == contents(sound)
    else:
        with pytest.raises(CacheError, match="another run has created"):
            fill(url, Pixels(NUM_IMAGES, seed=9))
        assert objects(url) == contents(begun)


def test_a_cache_that_another_machine_creates_and_finishes_meanwhile_is_taken_by_the_same_command(
    sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = new_url()
    with monkeypatch.context() as patch:
        created_meanwhile(sound, url, patch)
        with pytest.raises(CacheError, match="Fix: run the same command again"):  # its root has the errors of all rows
            fill(url)
    assert fill(url).shards_written == 0
    assert objects(url) == contents(sound)


def created_meanwhile(folder: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let another machine create the cache of a folder after this one has looked."""
    located = locate

    def meanwhile(location: str) -> Store:
        store = located(location)
        upload(folder, url)
        return store

    monkeypatch.setattr("logitcache.stage_one.inputs.locate", meanwhile)


def test_a_creation_that_was_killed_is_taken_up(sound: Path) -> None:
    url = new_url()
    first = {key: data for key, data in contents(sound).items() if not re.search(r"/c\.\d", key) and key != "zarr.json"}
    for key, data in first.items():
        Remote(url).write(key, data[:7])
    fill(url)
    assert objects(url) == contents(sound)


def test_garbage_is_collected_from_storage(url: str, sound: Path) -> None:
    remote = Remote(url)
    litter = {"t.logits/c.7.0.0": b"no view", "t.logits.commits/c.0.9.0.0": b"no shard", "t.pooled.basis/c/0": b"table"}
    for key, data in litter.items():
        remote.write(key, data)
    remote.write("notes.txt", b"mine")
    found = collect(url, dry_run=True)
    assert {garbage.path for garbage in found} == {
        f"{url}/t.logits/c.7.0.0",
        f"{url}/t.logits.commits/c.0.9.0.0",
        f"{url}/t.pooled.basis",
    }
    assert collect(url) == found
    assert objects(url) == contents(sound) | {"notes.txt": b"mine"}
    assert collect(url) == []


def test_a_growth_in_storage_is_given_up(url: str, sound: Path) -> None:
    remote = Remote(url)
    grown(url)
    after = objects(url)
    Remote(url).remove(after)
    upload(sound, url)
    for key in after.keys() - contents(sound).keys():
        remote.write(key, after[key])
    stored = Manifest.model_validate_json(
        json.dumps(json.loads(after["zarr.json"])["attributes"]["logitcache"]["manifest"])
    )
    growth = {"num_views": 3, "teachers": stored.model_dump(mode="json")["teachers"], "versions": stored.versions}
    remote.write(GROWING, json.dumps(growth).encode())
    assert inspect_cache(url)["growing"]["shards_committed"] == 9
    assert {garbage.path for garbage in collect(url)} == set()
    collect(url, growth=True)
    assert objects(url) == contents(sound)


def test_inspect_and_summary_say_what_they_say_of_a_folder(url: str, sound: Path) -> None:
    fill(sound, Pixels(NUM_IMAGES))
    ours, theirs = inspect_cache(url), inspect_cache(sound)
    assert ours.pop("cache") == url
    assert ours == {key: value for key, value in theirs.items() if key != "cache"}
    labelled = new_url()
    fill(labelled, Pixels(NUM_IMAGES, 16))
    found = summarize(labelled)
    assert (found.cache, found.views) == (labelled, 2)


def test_dask_reads_the_shards_of_a_cache_at_a_url(url: str, sound: Path) -> None:
    ours, theirs = (open_cache(where).as_dask()["t"]["logits"] for where in (url, sound))
    ours = pickle.loads(pickle.dumps(ours))
    assert np.array_equal(ours.compute(scheduler="threads"), theirs.compute(scheduler="threads"))


def test_a_run_is_not_kept_at_a_url() -> None:
    with pytest.raises(ValueError, match="is a URL; a run is kept in a folder of this machine"):
        small.student("memory://run", "memory://c.zarr")  # type: ignore[arg-type]


def test_the_commands_take_a_url(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["inspect", url], ["verify", url], ["gc", url], ["summary", url]):
        assert main([*command, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["cache"] == url
    change(url, SHARD, flipped)
    assert main(["verify", url]) == 3
    assert main(["inspect", f"{url}.absent"]) == 3
    assert f"{url}.absent does not exist" in capsys.readouterr().err


class _Quiet(SimpleHTTPRequestHandler):
    """Serves files, whole ones: it knows no ranges."""

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def web(cache: Path) -> Iterator[str]:
    """The sound cache on a web server."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), bound(_Quiet, directory=str(cache.parent)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/{cache.name}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_cache_on_a_web_server_is_read_and_verified_and_not_written(web: str, cache: Path, sound: Path) -> None:
    assert same_answers(open_cache(web), open_cache(sound))
    assert inspect_cache(web)["bytes"] == inspect_cache(sound)["bytes"]
    assert verify(web).problems == ()
    (cache / SHARD).write_bytes(flipped((cache / SHARD).read_bytes()))
    assert len(verify(web).problems) == 1
    (cache / SHARD).write_bytes((cache / SHARD).read_bytes()[:99])
    assert len(verify(web).problems) == 1
    (cache / SHARD).unlink()
    assert len(verify(web).problems) == 1
    with pytest.raises(RecipeError, match="a web server only hands out"):
        fill(f"{web}.new")
    with pytest.raises(RecipeError, match="a web server only hands out"):
        collect(web)
    (cache / "t.logits.commits/c.0.0.0.0").unlink()
    open_cache(web)  # the root is the same: what the copy has is taken to be so too
    with pytest.raises(CacheError, match="1 of 6 shards are not committed"):
        verify(web).problems and open_cache(web)


def test_no_copy_begins_outside_the_folder_of_copies(copies: Path) -> None:
    for url in ("memory://a/..", "memory://a/.", "memory://a/b c*"):
        path = locate(url).path
        assert path.parent.parent == copies
        assert creating(path).parent.parent == copies
