"""WebDataset shards: the same samples wherever they lie, read through once, then piece by piece."""

import io
import pickle
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from torch import nn
from torchvision.transforms.v2.functional import pil_to_tensor

from logitcache.cache.cache import open_cache
from logitcache.errors import DataError, MismatchError, RemoteError
from logitcache.stage_one.precompute import PrecomputeRecipe, precompute
from logitcache.store import digest_index
from logitcache.store.file_locks import turn
from logitcache.store.remote import client, protocols
from logitcache.views.datasets import ImageFolder, WebDataset, webdataset
from logitcache.views.datasets.archives import shard_files
from logitcache.views.datasets.archives.braces import expanded
from logitcache.views.datasets.archives.shard_index import shard_index_of
from logitcache.views.datasets.base import fingerprint
from logitcache.views.keys import ViewKey
from logitcache.views.loader import ViewLoader
from logitcache.views.spec import Views, ViewSpec
from tests.front import Answer, Front, Request
from tests.objects import Bucket, bucket, connecting, folder, website
from tests.views.archives import photograph, samples, tarred, written

PATTERN = "train-{000..002}.tar"


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an hour pass since each file was written, so that its stamp tells."""
    now = digest_index.now_ns
    monkeypatch.setattr(digest_index, "now_ns", lambda: now() + 3_600_000_000_000)


@pytest.fixture
def s3() -> Iterator[Bucket]:
    with bucket() as found:
        yield found


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three archives of five samples each."""
    for number in range(3):
        written(tmp_path, f"train-{number:03d}.tar", tarred(samples(range(5 * number, 5 * number + 5))))
    return tmp_path


def opened(place: object, pattern: str = PATTERN, **fields: Any):
    return WebDataset(shards=f"{place}/{pattern}", **fields).open()


def copied(shards: Path, s3: Bucket) -> str:
    for path in sorted(shards.glob("*.tar")):
        s3.put(f"there/{path.name}", path.read_bytes())
    return f"{s3.url}/there"


def one(folder: Path, *members: tuple[str, bytes], name: str = "one.tar", **fields: Any):
    written(folder, name, tarred(members))
    return opened(folder, name, **fields)


def test_samples_are_what_the_archives_hold(shards: Path) -> None:
    found = opened(shards)
    assert list(found.ids) == [f"{number:06d}" for number in range(15)]
    assert found.labels.tolist() == [number % 3 for number in range(15)]
    assert (found.num_classes, found.class_names) == (3, None)
    for number in range(15):
        with Image.open(io.BytesIO(photograph(number))) as image:
            expected = pil_to_tensor(image)
        assert torch.equal(found.read(number), expected)
        assert found.sizes()[number].tolist() == list(expected.shape[1:])


def test_contents_are_digested_as_those_of_files_in_a_folder(shards: Path, tmp_path: Path) -> None:
    for number in range(15):
        written(tmp_path / "files", f"{number:06d}.png", photograph(number))
    files = ImageFolder(root=str(tmp_path / "files")).open()
    found = opened(shards)
    assert np.array_equal(found.digests(), files.digests())
    assert np.array_equal(found.sizes(), files.sizes())


def test_a_data_set_is_the_same_on_a_disk_and_at_urls(shards: Path, s3: Bucket) -> None:
    local, here = opened(shards), opened(copied(shards, s3))
    assert list(here.ids) == list(local.ids)
    assert fingerprint(here) == fingerprint(local)
    with website(shards) as site:
        there = opened(site.url)
        mixed = WebDataset(shards=(f"{shards}/train-00{{0,1}}.tar", f"{site.url}/train-002.tar")).open()
        for found in (here, there, mixed, pickle.loads(pickle.dumps(here))):
            assert fingerprint(found) == fingerprint(local)
            for index, image in enumerate(found.read_batch(range(15))):
                assert torch.equal(image, local.read(index))
                assert torch.equal(image, found.read(index))


@pytest.mark.parametrize("indices", [[3], [14, 0, 7], [4, 5], range(15), range(14, -1, -1), [2, 2, 9]])
def test_a_batch_is_what_single_reads_give(shards: Path, indices: list[int]) -> None:
    found = opened(shards)
    for index, image in zip(indices, found.read_batch(indices), strict=True):
        assert torch.equal(image, found.read(index))


def spans(s3: Bucket) -> list[tuple[str, int, int]]:
    """List what was read of archives: name, and the half-open range of its bytes."""
    found = []
    for seen in s3.front.asked("GET", ".tar"):
        start, stop = seen.span.removeprefix("bytes=").split("-")
        found.append((seen.path.rpartition("/")[2], int(start), int(stop) + 1))
    return sorted(found)


def test_a_first_opening_reads_every_byte_once_and_a_second_one_what_has_changed(
    shards: Path, s3: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_files, "PART", 4096)
    place, size = copied(shards, s3), (shards / "train-000.tar").stat().st_size
    before = fingerprint(opened(place))
    stops = [*range(4096, size, 4096), size]
    each = list(zip([0, *stops], stops, strict=False))
    assert spans(s3) == [(f"train-00{number}.tar", *span) for number in range(3) for span in each]
    s3.front.seen.clear()
    assert fingerprint(opened(place)) == before
    assert spans(s3) == []
    s3.put("there/train-001.tar", tarred(samples([5, 6, 7, 98, 99])))
    after = opened(place)
    assert {name for name, *_ in spans(s3)} == {"train-001.tar"}
    assert fingerprint(after) != before
    assert list(after.ids)[5:10] == ["000005", "000006", "000007", "000098", "000099"]


@pytest.mark.usefixtures("settled")
def test_archives_on_a_disk_are_read_again_when_they_change(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(opened(shards))
    opens: list[str] = []
    read = shard_files.LocalTarShard.opened
    monkeypatch.setattr(shard_files.LocalTarShard, "opened", lambda *these: opens.append(str(these[0])) or read(*these))
    assert fingerprint(opened(shards)) == before
    assert opens == []
    path = written(shards, "train-002.tar", tarred(samples([*range(10, 14), 77])))
    assert fingerprint(opened(shards)) != before
    assert opens == [str(path)]


@pytest.mark.parametrize(
    ("headers", "passes"),
    [({}, 2), ({"ETag": '"1"'}, 1), ({"Last-Modified": formatdate(time.time() - 60, usegmt=True)}, 1)],
)
def test_a_server_without_tags_is_not_trusted(shards: Path, headers: dict[str, str], passes: int) -> None:
    origin = folder(shards)

    def tagged(request: Request) -> Answer:
        answer = origin(request)
        return answer._replace(headers=answer.headers | headers)

    front = Front(tagged)
    with connecting({}):
        for _ in range(2):
            opened(front.url, "train-000.tar")
    front.close()
    assert len(front.asked("GET")) == passes


@pytest.mark.parametrize(("age", "passes"), [(protocols._FRESH_SECONDS - 0.1, 2), (protocols._FRESH_SECONDS, 1)])
def test_a_file_that_changed_just_now_has_no_tag_yet(
    shards: Path, age: float, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin, changed = folder(shards), 1_700_000_000
    monkeypatch.setattr(protocols, "time", SimpleNamespace(time=lambda: changed + age))
    fresh = {"Last-Modified": formatdate(changed, usegmt=True)}
    front = Front(lambda request: origin(request)._replace(headers=fresh))
    with connecting({}):
        for _ in range(2):
            opened(front.url, "train-000.tar")
    front.close()
    assert len(front.asked("GET")) == passes


def test_neighbours_are_read_by_one_request(shards: Path, s3: Bucket) -> None:
    found = opened(copied(shards, s3))
    s3.front.seen.clear()
    images = found.read_batch([11, 0, 1, 3, 10])
    assert [name for name, *_ in spans(s3)] == ["train-000.tar", "train-002.tar"]
    assert torch.equal(images[2], found.read(1))


def test_the_answers_of_a_batch_are_awaited_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webdataset, "_GAP", -1)  # as images far apart are read
    count, latency = 64, 0.1
    written(tmp_path, "far.tar", tarred(samples(range(count))))
    with website(tmp_path) as site:
        found = opened(site.url, "far.tar")
        site.latency = latency
        site.seen.clear()
        start = time.perf_counter()
        images = found.read_batch(range(count))
        seconds = time.perf_counter() - start
        assert len(site.asked("GET")) == count
        assert site.most_at_once > client.REQUESTS / 2
        assert seconds < count * latency / 1.5
        assert torch.equal(Views(found, ViewSpec())[ViewKey(0, 5)], images[5])


@pytest.mark.slow
def test_workers_of_a_forkserver_read_from_the_web(shards: Path) -> None:
    with website(shards) as site:
        found = opened(site.url)
        batches = [[ViewKey(0, index)] for index in (3, 14, 0)]
        loader = ViewLoader(Views(found, ViewSpec()), 1, "forkserver")
        try:
            for (key,), images in zip(batches, loader.render(batches), strict=True):
                assert torch.equal(images[0], found.read(key.index))
        finally:
            loader.close()


def test_faults_that_pass_change_nothing(shards: Path, s3: Bucket) -> None:
    place = copied(shards, s3)
    s3.front.fail(0.2, "500", "503", "cut", seed=3)
    found = opened(place)
    assert fingerprint(found) == fingerprint(opened(shards))
    found.read_batch(range(0, 15, 4))
    assert s3.front.asked(failed=True)


def test_shards_that_were_read_before_an_error_are_remembered(shards: Path, s3: Bucket) -> None:
    place = copied(shards, s3)
    s3.put("there/train-001.tar", b"")
    with pytest.raises(DataError, match=r"train-001\.tar' cannot be read: it ends at byte 0"):
        opened(place)
    s3.put("there/train-001.tar", (shards / "train-001.tar").read_bytes())
    s3.front.seen.clear()
    opened(place)
    assert "train-000.tar" not in {name for name, *_ in spans(s3)}


def test_who_opens_at_the_same_time_reads_once(shards: Path, s3: Bucket) -> None:
    place = copied(shards, s3)
    s3.front.latency = 0.1
    with ThreadPoolExecutor(3) as pool:
        prints = list(pool.map(lambda _: fingerprint(opened(place)), range(3)))
    assert prints == 3 * [fingerprint(opened(shards))]
    assert [name for name, *_ in spans(s3)] == ["train-000.tar", "train-001.tar", "train-002.tar"]


def test_who_waits_for_others_can_be_told_to_stop(shards: Path, tmp_path: Path) -> None:
    waiting, ready = threading.Event(), threading.Event()
    with turn(tmp_path / "kept", waiting), ThreadPoolExecutor(1) as pool:

        def wait() -> None:
            ready.set()
            with turn(tmp_path / "kept", waiting):
                pass

        waiter = pool.submit(wait)
        ready.wait()
        time.sleep(0.05)
        assert not waiter.done()
        waiting.set()
        waiter.result(timeout=10)
    with pytest.raises(CancelledError):
        shard_index_of(shard_files.shard_at(f"{shards}/train-000.tar"), waiting)


def test_names_whose_numbers_are_equal_are_compared_themselves(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webdataset, "hash", len, raising=False)
    assert list(opened(shards).ids) == [f"{number:06d}" for number in range(15)]
    written(shards, "train-002.tar", tarred(samples([8])))
    with pytest.raises(DataError, match=r"sample '000008' is in two shards, '.*001\.tar' and '.*002\.tar'"):
        opened(shards)


class Mean(nn.Module):
    """A teacher of three classes."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3))


def test_a_student_reads_copies_of_the_shards_that_the_teacher_saw(shards: Path, s3: Bucket, tmp_path: Path) -> None:
    recipe = PrecomputeRecipe.model_validate_json(
        f"""{{"cache": "{tmp_path}/c.zarr",
        "dataset": {{"kind": "webdataset", "shards": "{copied(shards, s3)}/{PATTERN}"}},
        "views": {{"num_views": 2, "augmentations": [{{"kind": "random_resized_crop", "size": 6}}]}},
        "teachers": {{"t": {{"preprocessing": {{"mean": [0, 0, 0], "std": [1, 1, 1]}}}}}},
        "num_workers": 0, "device": "cpu"}}"""
    )
    precompute(recipe, teachers={"t": Mean()})
    cache = open_cache(tmp_path / "c.zarr")
    from_storage, from_disk = (
        [batch.images for batch in cache.loader(4, dataset=dataset, seed=3).epoch(1)]
        for dataset in (None, WebDataset(shards=f"{shards}/{PATTERN}"))
    )
    assert len(from_disk) == 4
    assert all(torch.equal(*both) for both in zip(from_storage, from_disk, strict=True))
    written(shards, "train-001.tar", tarred(samples([5, 6, 7, 8, 99])))
    with pytest.raises(MismatchError, match="ids and their order"):
        cache.loader(4, dataset=WebDataset(shards=f"{shards}/{PATTERN}"))


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_ids_are_paths_up_to_the_first_dot_of_the_name(tmp_path: Path, format: int) -> None:
    long, image = "d.1/" + "é" * 90 + "/" + "n" * 120, photograph(1)
    names = [f"{long}.png", "./b/c.PNG", "b/c.seg.png", "b/d.jpeg", "b/d.txt"]
    hidden = ["b/.e.png", ".trash/f.png", "README", "./._c.png"]
    written(tmp_path, "one.tar", tarred([(name, image) for name in [*names, *hidden]], format))
    found = opened(tmp_path, "one.tar")
    assert list(found.ids) == [long, "b/c", "b/d"]
    assert found.labels.tolist() == [-1, -1, -1]
    assert found.num_classes is None


def test_members_of_a_sample_may_lie_apart(tmp_path: Path) -> None:
    a, b = photograph(1), photograph(2)
    found = one(tmp_path, ("a.cls", b"4"), ("b.png", b), ("a.png", a), ("b.cls", b" 2\n"))
    assert list(found.ids) == ["a", "b"]
    assert found.labels.tolist() == [4, 2]
    assert torch.equal(found.read(0), one(tmp_path, ("x.png", a), name="x.tar").read(0))


@pytest.mark.parametrize(
    ("texts", "labels", "num_classes"),
    [
        (["0", "-1", "5"], [0, -1, 5], 6),
        (["007", "1\n", "null"], [7, 1, -1], 8),
        (["-1", "-1", "-1"], [-1, -1, -1], None),
        (["[1, 0, -1]", "[0,0,1]", "-1"], [[1, 0, -1], [0, 0, 1], [-1, -1, -1]], 3),
    ],
)
def test_labels_are_one_class_or_any_number(
    tmp_path: Path, texts: list[str], labels: object, num_classes: int | None
) -> None:
    found = one(tmp_path, *samples(range(3), dict(enumerate(texts))))
    assert found.labels.tolist() == labels
    assert found.num_classes == num_classes
    assert found.labels.dtype == (np.int8 if isinstance(labels[0], list) else np.int64)
    assert fingerprint(found).multi_label == isinstance(labels[0], list)


def test_labels_are_left_alone_where_none_are_wanted(tmp_path: Path) -> None:
    found = one(tmp_path, ("a.png", photograph(1)), ("a.cls", b"cat"), ("b.png", photograph(2)), labelled=False)
    assert found.labels.tolist() == [-1, -1]


def test_the_number_of_classes_may_be_more_than_there_are_labels_of(shards: Path) -> None:
    assert opened(shards, num_classes=10).num_classes == 10
    with pytest.raises(DataError, match=r"image '000002' of the shards has label 2, but there are 2 classes"):
        opened(shards, num_classes=2)


IMAGE = photograph(0)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], "holds no samples"),
        ([("README", b"x")], "holds no samples"),
        ([("a.png", IMAGE), ("b.cls", b"1")], r"sample 'b' of shard .* has no image, but 'b\.cls'"),
        ([("a.left.png", IMAGE)], r"sample 'a' of shard .* has no image, but 'a\.left\.png'"),
        ([("a.png", IMAGE), ("a.jpg", IMAGE)], r"sample 'a' of shard .* two images: 'a\.png', 'a\.jpg'"),
        ([("a.png", IMAGE), ("a.png", IMAGE)], r"sample 'a' of shard .* two images: 'a\.png', 'a\.png'"),
        ([("a.png", IMAGE), ("a.cls", b"1"), ("a.cls", b"1")], "sample 'a' of shard .* two labels"),
        ([("a.png", b"no image")], r"image 'a\.png' in '.*one\.tar' cannot be read: cannot identify"),
        ([("a.png", b"")], r"image 'a\.png' in '.*one\.tar' cannot be read"),
        ([("a.heic", IMAGE)], r"'a\.heic' in '.*one\.tar' is an image of a type"),
        ([("a.png", IMAGE), ("b.png", IMAGE), ("b.cls", b"1")], "sample 'a' of shard .* it has no '.cls', and others"),
        ([("a.png", IMAGE), ("a.cls", b"cat")], r"sample 'a' of shard .*its text is b'cat'"),
        ([("a.png", IMAGE), ("a.cls", b"-2")], "sample 'a' of shard .*not -2"),
        ([("a.png", IMAGE), ("a.cls", b"[1, 7]")], r"sample 'a' of shard .*not \[1, 7\]"),
        ([("a.png", IMAGE), ("a.cls", b'{"x": 1}')], "sample 'a' of shard .*a label is one whole number"),
        ([("a.png", IMAGE), ("a.cls", b"1"), ("b.png", IMAGE), ("b.cls", b"[1, 0]")], "sample 'b' .*of 2 classes"),
    ],
)
def test_a_shard_that_is_broken_or_ambiguous_is_refused(
    tmp_path: Path, members: list[tuple[str, bytes]], message: str
) -> None:
    with pytest.raises(DataError, match=f"(?s){message}.*Fix:"):
        one(tmp_path, *members)


def test_a_shard_that_is_missing_cut_or_compressed_is_refused_by_name(shards: Path, s3: Bucket) -> None:
    for place in (str(shards), copied(shards, s3)):
        with pytest.raises(DataError, match=rf"shard '{place}/none\.tar' cannot be read"):
            opened(place, "none.tar")
    whole = (shards / "train-000.tar").read_bytes()
    written(shards, "train-000.tar", whole[:3000])
    with pytest.raises(DataError, match=r"train-000\.tar' cannot be read: it ends at byte 3000"):
        opened(shards)
    written(shards, "train-000.tar", b"\x1f\x8b" + whole)
    with pytest.raises(DataError, match=r"train-000\.tar' cannot be read: it is compressed(.|\n)*not compressed"):
        opened(shards)
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        opened(shards.parent, shards.name)


def test_a_sample_in_two_shards_is_refused_with_both(shards: Path) -> None:
    written(shards, "train-002.tar", tarred(samples([10, 3])))
    with pytest.raises(DataError, match=r"sample '000003' is in two shards, '.*train-000\.tar' and '.*train-002\.tar'"):
        opened(shards)


def swapped(data: bytes) -> bytes:
    """Change a byte of the pixels of the first image: nothing but its digest tells."""
    at = data.index(b"IDAT") + 10
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize("change", [swapped, lambda data: data[:600], lambda data: b""])
@pytest.mark.parametrize("remote", [True, False])
def test_a_shard_that_changes_after_the_opening_is_refused_when_it_is_read(
    shards: Path, s3: Bucket, change: Callable[[bytes], bytes], remote: bool
) -> None:
    data = (shards / "train-001.tar").read_bytes()
    found = opened(copied(shards, s3) if remote else shards)
    s3.put("there/train-001.tar", change(data))
    written(shards, "train-001.tar", change(data))
    with pytest.raises(DataError, match=r"image of sample '000005' in shard '.*train-001\.tar' is not what it was"):
        found.read_batch([0, 5, 9])
    s3.remove("there/train-001.tar")
    (shards / "train-001.tar").unlink()
    with pytest.raises(DataError, match=r"sample '000005' in shard '.*train-001\.tar' cannot be read"):
        found.read(5)


def test_a_shard_that_changes_while_it_is_read_is_refused(
    shards: Path, s3: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = copied(shards, s3)
    read = shard_files.RemoteTarShard.opened

    def changing(shard: shard_files.RemoteTarShard, size: int):
        s3.put("there/train-000.tar", tarred(samples(range(5), {0: "2"})))
        return read(shard, size)

    monkeypatch.setattr(shard_files.RemoteTarShard, "opened", changing)
    with pytest.raises(DataError, match=r"train-000\.tar' changed while it was read"):
        opened(place, "train-000.tar")


def test_what_the_storage_refuses_is_no_fault_of_the_shards(shards: Path, s3: Bucket) -> None:
    place = copied(shards, s3)
    found = opened(place)
    s3.front.fail(1.0, "403")
    for use in (lambda: found.read(0), lambda: opened(place)):
        with pytest.raises(RemoteError):
            use()


@given(
    st.lists(st.tuples(st.text("ab-/", max_size=4), st.integers(0, 120), st.integers(0, 4)), max_size=3),
    st.text("xy.", max_size=3),
)
def test_braces_stand_for_every_combination_in_order(parts: list[tuple[str, int, int]], end: str) -> None:
    pattern, expected = "", [""]
    for text, first, more in parts:
        pattern += f"{text}{{{first:03d}..{first + more:03d}}}"
        expected = [f"{one}{text}{number:03d}" for one in expected for number in range(first, first + more + 1)]
    assert expanded(pattern + end) == [one + end for one in expected]


def test_braces_hold_lists_too() -> None:
    assert expanded("{a,b,}-{8..10}") == [f"{a}-{n}" for a in ("a", "b", "") for n in (8, 9, 10)]


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ("a-{5..3}.tar", "counts down"),
        ("a-{000..}.tar", "neither a range"),
        ("a-{}.tar", "neither a range"),
        ("a-{1..2.tar", "a brace without its other one"),
        ("a-{{1..2}}.tar", "braces inside braces"),
        ([], "it names no shard"),
        ("", "it names no shard"),
        (["a.tar", "b.tar", "a.tar"], "'a.tar' is named twice"),
    ],
)
def test_a_pattern_that_names_nothing_is_refused(shards: object, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        WebDataset.model_validate({"shards": tuple(shards) if isinstance(shards, list) else shards})


def test_shards_without_labels_that_are_to_be_labelled_are_refused(tmp_path: Path) -> None:
    members = [("a.png", photograph(1)), ("b.png", photograph(2))]
    with pytest.raises(DataError, match=r"(?s)no sample of .* has a label .*Fix: .*labelled: false"):
        one(tmp_path, *members, labelled=True)
    for fields in ({}, {"labelled": False}):
        assert one(tmp_path, *members, **fields).labels.tolist() == [-1, -1]
    assert one(tmp_path, *members, ("a.cls", b"1"), ("b.cls", b"0"), labelled=True).labels.tolist() == [1, 0]
