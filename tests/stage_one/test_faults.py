"""What stops a run: images, answers, disks and signals; what was committed stays."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import Tensor, nn

from logitcache.cache.cache import Cache, open_cache
from logitcache.cache.snapshot import open_snapshot
from logitcache.errors import CacheError, DataError, LogitCacheError, MismatchError, RecipeError, Stopped
from logitcache.views.canaries import choose
from tests.cache.made import (
    AGAIN,
    DENSE16,
    FLIP_AND_CROP,
    TOP2,
    Linear,
    Pixels,
    contents,
    recipe,
    run,
    stamps,
    teacher,
    write_images,
)
from tests.stage_one.runs import NUM_IMAGES, entry, folder, partial, truncated, whole

REPOSITORY = Path(__file__).parents[2]


def test_a_run_that_fails_before_its_cache_exists_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="keeps k = 17 of 16 classes"):
        run(tmp_path / "c.zarr", Pixels(20), teachers={"t": teacher({**TOP2, "k": 17})})
    assert os.listdir(tmp_path) == []


def test_a_run_that_is_interrupted_while_its_cache_is_created_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "c.zarr", Pixels(20))
    assert os.listdir(tmp_path) == []


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """More images than there are canaries."""
    return write_images(tmp_path / "images", {"ant": 100, "bee": 100})


SMALL = {"teachers": {"t": teacher({**DENSE16, "storage": "packed"})}, "batch_size": 15, "shard_rows": 40}


def bad_image(path: Path, root: Path, views: int = 2) -> str:
    """Choose an image of the second half that is no canary."""
    spec = recipe(path, dataset=entry(root), **SMALL)
    taken = {key.index for key in choose(spec.views.seed, 200, views)}
    return f"bee/{next(row for row in range(120, 200) if row not in taken) - 100:03d}.png"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_unreadable_image_stops_the_run_and_once_mended_it_continues(
    num_workers: int, many: Path, tmp_path: Path
) -> None:
    path = tmp_path / "c.zarr"
    changes = {**SMALL, "dataset": entry(many), "num_workers": num_workers, "start_method": "fork"}
    name = bad_image(path, many)
    data = truncated(many, name)
    for _ in range(2):
        with pytest.raises(DataError, match=name.replace(".", r"\.")) as caught:
            run(path, None, Linear(2), **changes)
        assert caught.value.exit_code == 2
    done = Cache(open_snapshot(path)).shards
    assert len(done) == 3
    before = stamps(path)
    (many / name).write_bytes(data)
    assert run(path, None, Linear(2), **changes).shards_written == 10 - len(done)
    after = stamps(path)
    kept = [f"t.logits.commits/c.{shard.view}.{shard.start // 40}.0.0" for shard in done]
    assert all(before[file] == after[file] for file in kept)
    run(tmp_path / "w.zarr", None, Linear(2), **changes)
    assert contents(path) == contents(tmp_path / "w.zarr")
    open_cache(path).views()


def test_only_the_image_that_stopped_a_run_may_be_another_when_it_continues(many: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.zarr"
    changes = {**SMALL, "dataset": entry(many)}
    name = bad_image(path, many)
    data = truncated(many, name)
    with pytest.raises(DataError):
        run(path, None, Linear(2), **changes)
    other = many / "bee/099.png"
    unchanged = other.read_bytes()
    (many / name).write_bytes(data)
    other.write_bytes(data)
    with pytest.raises(MismatchError, match="2 of 200 images changed"):
        run(path, None, Linear(2), **changes)
    other.write_bytes(unchanged)
    run(path, None, Linear(2), **changes)
    run(tmp_path / "w.zarr", None, Linear(2), **changes)
    assert contents(path) == contents(tmp_path / "w.zarr")


def test_an_image_with_answers_stays_the_one_that_was_answered(many: Path, tmp_path: Path) -> None:
    """It became unreadable between two views: only the original may be put back."""
    path = tmp_path / "c.zarr"
    changes = {**SMALL, "dataset": entry(many)}
    name = bad_image(path, many)

    class Breaking(Linear):
        calls = 0

        def forward(self, images: Tensor) -> Tensor:
            type(self).calls += 1
            if self.calls == 16:  # the canaries, then fifteen batches: the first view
                self.data = truncated(many, name)
            return super().forward(images)

    module = Breaking(2)
    with pytest.raises(DataError):
        run(path, None, module, **changes)
    assert len(Cache(open_snapshot(path)).shards) >= 5
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(many / name)
    with pytest.raises(MismatchError, match="1 of 200 images changed"):
        run(path, None, Linear(2), **changes)
    (many / name).write_bytes(module.data)
    run(path, None, Linear(2), **changes)
    assert not (path / "digest/unreadable").exists()
    assert open_cache(path).complete


def test_an_unreadable_canary_stops_the_run_before_there_is_a_cache(tmp_path: Path) -> None:
    root = folder(tmp_path / "images")
    for number in range(20):
        truncated(root, f"bee/{number:03d}.png")
    with pytest.raises(DataError, match=r"bee/0\d\d\.png"):
        run(tmp_path / "c.zarr", None, Linear(2), dataset=entry(root))
    assert os.listdir(tmp_path) == ["images"]


class Wrong(nn.Module):
    """A teacher that answers well at first, and then with what `spoil` makes of its answers."""

    def __init__(self, spoil: Callable[[Tensor], Any], after: int = 0) -> None:
        super().__init__()
        self.inner, self.spoil, self.left = Linear(), spoil, after + AGAIN

    def forward(self, images: Tensor) -> Any:
        self.left -= 1
        answers = self.inner(images)
        return answers if self.left >= 0 else self.spoil(answers)


def at(value: float) -> Callable[[Tensor], Tensor]:
    def spoil(answers: Tensor) -> Tensor:
        answers = answers.clone()
        answers[3, 2] = value
        return answers

    return spoil


SPOILT: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "nan": (at(float("nan")), "teacher 't' answers image '00053' with inf or nan"),
    "inf": (at(float("inf")), "teacher 't' answers image '00053' with inf or nan"),
    "minus inf": (at(-float("inf")), "teacher 't' answers image '00053' with inf or nan"),
    "too large": (at(70000.0), "a logit of image '00053' does not fit torch.float16"),
    "a tuple": (lambda answers: (answers, answers), r"returned a tuple of \{\[50, 16\], \[50, 16\]\}, not logits"),
    "a dict": (
        lambda answers: {"a": answers, "b": answers},
        r"returned a dict of \{a: \[50, 16\], b: \[50, 16\]\}, not logits",
    ),
    "too few rows": (lambda answers: answers[:-1], "returns 49 rows of logits for 50 images"),
    "one row": (lambda answers: answers[:1], "returns 1 rows of logits for 50 images"),
    "other columns": (lambda answers: answers[:, :1], r"returns logits \[1\] for image '00050', and \[16\] before"),
    "maps": (lambda answers: answers[:, :, None], r"returned \[50, 16, 1\], not logits"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_wrong_answer_stops_the_run_and_is_not_stored(name: str, tmp_path: Path) -> None:
    path = tmp_path / "c.zarr"
    spoil, message = SPOILT[name]
    with pytest.raises(LogitCacheError, match=message) as caught:
        run(path, Pixels(NUM_IMAGES), Wrong(spoil, after=2), shard_rows=128)
    assert caught.value.exit_code == 2
    assert Cache(open_snapshot(path)).shards == []


def test_top_k_refuses_answers_that_are_not_finite_even_where_it_drops_them(tmp_path: Path) -> None:
    module = Wrong(at(-float("inf")), after=1)
    with pytest.raises(DataError, match="answers image '00003'"):
        run(tmp_path / "c.zarr", Pixels(60), module, teachers={"t": teacher(TOP2)})


def test_a_disk_that_cannot_be_written_is_a_cache_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Any, target: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    partial(tmp_path / "c.zarr")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(CacheError, match="No space left on device"):
            run(tmp_path / "c.zarr", Pixels(NUM_IMAGES), shard_rows=128)
    assert run(tmp_path / "c.zarr", Pixels(NUM_IMAGES), shard_rows=128).shards_written == 5
    assert contents(tmp_path / "c.zarr") == whole(tmp_path / "w.zarr")


CALLS = ("mkdir", "open", "fsync", "replace")
"""What fails first where a disk is full, read-only or gone."""


class Failing:
    """Let the calls that change a disk fail from the n-th on."""

    def __init__(self, patch: pytest.MonkeyPatch, first: int, code: int) -> None:
        self.count, self.first, self.code = 0, first, code
        for name in CALLS:
            patch.setattr(os, name, self.wrapped(getattr(os, name)))

    def wrapped(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self.count += 1
            if self.count > self.first:
                raise OSError(self.code, os.strerror(self.code))
            return real(*args, **options)

        return call


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EIO])
def test_a_disk_that_fails_at_any_moment_is_an_error_and_the_same_command_continues(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = Pixels(NUM_IMAGES)
    views = {"num_views": 2, "seed": 3, "augmentations": FLIP_AND_CROP}
    small = {"shard_rows": 2048, "batch_size": 300}

    def grown(path: Path) -> None:
        run(path, images, views=views | {"num_views": 1}, **small)
        run(path, images, views=views, **small)

    with monkeypatch.context() as patch:
        failing = Failing(patch, 10**9, code)
        grown(tmp_path / "w.zarr")
    assert failing.count > 100
    for point in range(code % 7, failing.count - 2, failing.count // 8):
        path = tmp_path / str(point) / "c.zarr"
        with monkeypatch.context() as patch:
            Failing(patch, point, code)
            with pytest.raises(CacheError, match="Fix:"):
                grown(path)
        if (path / "zarr.json").exists():
            Cache(open_snapshot(path))
        grown(path)
        assert contents(path) == contents(tmp_path / "w.zarr")


def test_a_full_disk_loses_nothing_and_with_more_room_the_same_command_continues(tmp_path: Path) -> None:
    """On a file system of its own, which takes a kernel that lets users have one."""
    command = ["unshare", "-Urm", sys.executable, "-m", "tests.stage_one.full_disk", str(tmp_path)]
    if subprocess.run(["unshare", "-Urm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs user namespaces")
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode == 77:
        pytest.skip("needs to mount a tmpfs")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "No space left on device" in found["error"]
    assert "Fix: free space on the disk" in found["error"]
    assert 0 < found["committed"] < found["shards"]
    assert found["written"] == found["shards"] - found["committed"]
    assert found["sound"]
    assert found["identical"]


def test_a_cache_that_vanishes_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "c.zarr"

    def vanish(answers: Tensor) -> Tensor:
        shutil.rmtree(path, ignore_errors=True)
        return answers

    with pytest.raises(CacheError, match="No such file or directory"):
        run(path, Pixels(NUM_IMAGES), Wrong(vanish, after=4), shard_rows=128)
    assert os.listdir(tmp_path) == []
    run(path, Pixels(NUM_IMAGES), shard_rows=128)
    assert contents(path) == whole(tmp_path / "w.zarr")


@pytest.mark.parametrize("year", [1975, 2100])
def test_the_clock_does_not_matter(year: int, tmp_path: Path) -> None:
    """Files of another time than now, as a clock that was set leaves them."""
    path = tmp_path / "c.zarr"
    partial(path)
    seconds = (year - 1970) * 365 * 86400
    for file in path.rglob("*"):
        os.utime(file, (seconds, seconds))
    assert run(path, Pixels(NUM_IMAGES), shard_rows=128).shards_written == 5
    assert contents(path) == whole(tmp_path / "w.zarr")


def test_a_stop_keeps_committed_shards_and_its_exit_code(tmp_path: Path) -> None:
    class Signalling(Linear):
        calls = 0

        def forward(self, images: Tensor) -> Tensor:
            self.calls += 1
            if self.calls == 6 + AGAIN:
                signal.raise_signal(signal.SIGTERM)
            return super().forward(images)

    with pytest.raises(Stopped, match="1 of the 6 shards") as caught:
        run(tmp_path / "c.zarr", Pixels(NUM_IMAGES), Signalling(), shard_rows=128)
    assert caught.value.exit_code == 75
    assert run(tmp_path / "c.zarr", Pixels(NUM_IMAGES), shard_rows=128).shards_written == 5
    assert contents(tmp_path / "c.zarr") == whole(tmp_path / "w.zarr")
