"""Precompute: what it writes, what it refuses to continue, and what stops it."""

import errno
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from logitcache import console
from logitcache.cache.create import read_manifest, writer_lock
from logitcache.cache.reader import Cache, open_cache
from logitcache.errors import CacheError, DataError, LogitCacheError, MismatchError, RecipeError, Stopped
from logitcache.models import save_weights
from logitcache.models.small_cnn import small_cnn
from logitcache.teacher.precompute import precompute
from logitcache.views.canaries import choose
from logitcache.views.datasets import ImageFolder
from logitcache.views.keys import ViewKey
from tests.cache.made import (
    DENSE16,
    DENSE32,
    FLIP_AND_CROP,
    TOP2,
    Linear,
    Pixels,
    contents,
    raw,
    recipe,
    run,
    stamps,
    teacher,
    write_images,
)

NUM_IMAGES = 300


class Stopping(nn.Module):
    """A linear teacher that raises after some batches, as a fault in the middle of a run would."""

    def __init__(self, batches: int, **options: Any) -> None:
        super().__init__()
        self.inner = Linear(**options)
        self.left = batches
        self.weight = self.inner.weight

    def forward(self, images: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        answers: Tensor = self.inner(images)
        return answers

    def state_dict(self, *args: Any, **options: Any) -> Any:
        return self.inner.state_dict(*args, **options)


def partial(path: Path, images: object | None = None, batches: int = 5, **changes: Any) -> None:
    """Leave a run in its middle: canaries take one batch, each shard of 128 rows three."""
    with pytest.raises(KeyboardInterrupt):
        run(path, images or Pixels(NUM_IMAGES), Stopping(batches), **({"shard_rows": 128} | changes))


def whole(path: Path, images: object | None = None, **changes: Any) -> dict[str, bytes]:
    run(path, images or Pixels(NUM_IMAGES), **({"shard_rows": 128} | changes))
    return contents(path)


def test_the_result_counts_what_was_done(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "c.zarr"
    result = run(path, Pixels(NUM_IMAGES), shard_rows=128)
    assert (result.cache, result.shards, result.shards_written) == (str(path), 6, 6)
    assert (result.views, result.teacher_passes) == (600, 600)
    assert result.bytes == sum(len(data) for data in contents(path).values())
    assert result.seconds > 0


def test_a_complete_cache_says_that_there_is_nothing_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole(tmp_path / "c.zarr")
    before = stamps(tmp_path)
    console.configure()
    try:
        result = run(tmp_path / "c.zarr", Pixels(NUM_IMAGES), shard_rows=128)
    finally:
        console.configure(quiet=True)
    assert "is complete, there is nothing to do" in capsys.readouterr().err
    assert (result.shards, result.shards_written, result.views, result.teacher_passes) == (6, 0, 0, 0)
    assert stamps(tmp_path) == before


def test_a_run_continues_where_another_stopped(tmp_path: Path) -> None:
    partial(tmp_path / "c.zarr")
    done = [name for name in contents(tmp_path / "c.zarr") if name.startswith("t.commits/c.")]
    assert done == ["t.commits/c.0.0.0.0"]
    before = stamps(tmp_path / "c.zarr")
    result = run(tmp_path / "c.zarr", Pixels(NUM_IMAGES), shard_rows=128)
    assert (result.shards, result.shards_written, result.views) == (6, 5, 600 - 128)
    after = stamps(tmp_path / "c.zarr")
    assert all(after[name] == before[name] for name in ("t.commits/c.0.0.0.0", "t.logits/c.0.0.0", "zarr.json"))
    assert contents(tmp_path / "c.zarr") == whole(tmp_path / "w.zarr")
    assert sorted(os.listdir(tmp_path)) == ["c.zarr", "w.zarr"]


class Other(Pixels):
    """Images that are changed, or in another order, before they are seen."""

    def __init__(self, change: Callable[[Pixels], object], num_classes: int | None = None) -> None:
        super().__init__(NUM_IMAGES, num_classes)
        change(self)


def reverse(data: Pixels) -> None:
    data.images = data.images[::-1]


def one_pixel(data: Pixels) -> None:
    data.images[250, 0, 0, 0] ^= 1


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another seed": ({"views": {"num_views": 2, "seed": 4, "augmentations": FLIP_AND_CROP}}, "seed.* 3.* 4"),
    "more views": ({"views": {"num_views": 3, "seed": 3, "augmentations": FLIP_AND_CROP}}, "num_views.* 2.* 3"),
    "fewer augmentations": (
        {"views": {"num_views": 2, "seed": 3, "augmentations": FLIP_AND_CROP[:1]}},
        "augmentations: the cache has .*horizontal_flip.*the recipe",
    ),
    "another padding": (
        {"views": {"num_views": 2, "seed": 3, "augmentations": [{**FLIP_AND_CROP[0], "padding": 2}, FLIP_AND_CROP[1]]}},
        'augmentations.*"padding": 1.*"padding": 2',
    ),
    "another normalisation": (
        {"teachers": {"t": teacher(preprocessing={"mean": [0.4] * 3, "std": [0.5] * 3})}},
        r"preprocessing: the cache has .*0\.5.*the recipe .*0\.4",
    ),
    "another precision": ({"teachers": {"t": teacher(precision="bfloat16")}}, "precision.*'float32'.*'bfloat16'"),
    "another dtype": ({"teachers": {"t": teacher(DENSE32)}}, 'logits: .*"float16".*"float32"'),
    "another encoding": ({"teachers": {"t": teacher(TOP2)}}, 'logits: .*"dense".*"top_k"'),
    "another storage": ({"teachers": {"t": teacher({**DENSE16, "storage": "packed"})}}, 'logits: .*"hot".*"packed"'),
    "another size of shards": ({"shard_rows": 256}, "shard_rows: the cache has 128, the recipe 256"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("finished", [True, False])
def test_another_recipe_is_refused_with_both_values(name: str, finished: bool, tmp_path: Path) -> None:
    path = tmp_path / "c.zarr"
    whole(path) if finished else partial(path)
    before = stamps(path)
    changes, message = REFUSED[name]
    with pytest.raises(MismatchError, match=f"(?s)made by another recipe.*{message}.*Fix:") as caught:
        run(path, Pixels(NUM_IMAGES), **({"shard_rows": 128} | changes))
    assert caught.value.exit_code == 4
    assert stamps(path) == before


@pytest.mark.parametrize("finished", [True, False])
def test_another_teacher_under_the_same_name_is_refused(finished: bool, tmp_path: Path) -> None:
    path = tmp_path / "c.zarr"
    whole(path) if finished else partial(path)
    before = stamps(path)
    nearly = Linear()
    with torch.no_grad():
        nearly.weight[0, 0] += 1e-6
    for module, message in ((nearly, "t.weights"), (Linear(17), "num_classes: the cache has 16, the recipe 17")):
        with pytest.raises(MismatchError, match=message) as caught:
            run(path, Pixels(NUM_IMAGES), module, shard_rows=128)
        assert caught.value.exit_code == 4
    with pytest.raises(MismatchError, match=r"teachers.t: only in the cache\n  teachers.u: only in the recipe"):
        precompute(
            recipe(path, teachers={"u": teacher()}, shard_rows=128),
            teachers={"u": Linear()},
            dataset=Pixels(NUM_IMAGES),
        )
    assert stamps(path) == before


@pytest.mark.parametrize("change", [reverse, one_pixel])
@pytest.mark.parametrize("finished", [True, False])
def test_other_images_in_memory_are_refused(change: Any, finished: bool, tmp_path: Path) -> None:
    path = tmp_path / "c.zarr"
    whole(path) if finished else partial(path)
    before = stamps(path)
    with pytest.raises(MismatchError, match="content of the images") as caught:
        run(path, Other(change), shard_rows=128)
    assert caught.value.exit_code == 4
    assert stamps(path) == before


def folder(root: Path) -> Path:
    return write_images(root, {"ant": 20, "bee": 20})


def entry(root: Path, **options: Any) -> dict[str, Any]:
    return {"kind": "image_folder", "root": str(root), **options}


def change_a_byte(root: Path) -> None:
    # In the text after the image: the pixels stay.
    path = root / "bee/010.png"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def change_a_pixel(root: Path) -> None:
    pixels = np.array(Image.open(root / "bee/010.png"))
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(root / "bee/010.png")


def save_again(root: Path) -> None:
    Image.open(root / "bee/010.png").save(root / "bee/010.png", compress_level=1)


def add(root: Path) -> None:
    shutil.copy(root / "ant/000.png", root / "bee/999.png")


def remove(root: Path) -> None:
    (root / "bee/010.png").unlink()


def rename(root: Path) -> None:
    (root / "bee/010.png").rename(root / "bee/010b.png")


def relabel(root: Path) -> None:
    (root / "ant/019.png").rename(root / "bee/000-.png")


def rename_a_class(root: Path) -> None:
    (root / "bee").rename(root / "cow")


CHANGES = {
    change_a_byte: r"1 of 40 images changed: 'bee/010\.png'",
    change_a_pixel: r"1 of 40 images changed: 'bee/010\.png'",
    save_again: r"1 of 40 images changed: 'bee/010\.png'",
    add: "number of images: recorded 40, here 41",
    remove: "number of images: recorded 40, here 39",
    rename: "ids and their order: recorded [0-9a-f]{12}…, here [0-9a-f]{12}…",
    relabel: "labels: recorded [0-9a-f]{12}…, here [0-9a-f]{12}…",
    rename_a_class: "ids and their order",
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("finished", [True, False])
def test_a_changed_folder_is_refused(change: Callable[[Path], None], finished: bool, tmp_path: Path) -> None:
    path, root = tmp_path / "c.zarr", folder(tmp_path / "images")
    # Packed shards may be of any size: two a view, the second not written when the run is cut short.
    changes = {"dataset": entry(root), "teachers": {"t": teacher({**DENSE16, "storage": "packed"})}, "batch_size": 10}
    if finished:
        run(path, None, Linear(2), shard_rows=20, **changes)
    else:
        with pytest.raises(KeyboardInterrupt):
            run(path, None, Stopping(4, num_classes=2), shard_rows=20, **changes)
    before = stamps(path)
    change(root)
    with pytest.raises(MismatchError, match=CHANGES[change]) as caught:
        run(path, None, Linear(2), shard_rows=20, **changes)
    assert caught.value.exit_code == 4
    assert stamps(path) == before
    if finished:
        with pytest.raises(MismatchError, match=CHANGES[change]):
            open_cache(path).views()


def test_a_moved_folder_is_the_same_data_set(tmp_path: Path) -> None:
    path, root = tmp_path / "c.zarr", folder(tmp_path / "images")
    run(path, None, Linear(2), dataset=entry(root))
    root.rename(tmp_path / "moved")
    assert run(path, None, Linear(2), dataset=entry(tmp_path / "moved")).shards_written == 0
    with pytest.raises(DataError, match="does not exist"):
        open_cache(path).views()
    open_cache(path).views(ImageFolder(root=str(tmp_path / "moved")))


def test_labels_that_are_no_longer_there_are_refused(tmp_path: Path) -> None:
    path, root = tmp_path / "c.zarr", folder(tmp_path / "images")
    run(path, None, Linear(2), dataset=entry(root))
    with pytest.raises(MismatchError, match="number of classes: recorded 2, here None"):
        run(path, None, Linear(2), dataset=entry(root, labelled=False))


def test_a_teacher_of_other_classes_than_the_labels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        MismatchError, match=r"teacher 't' predicts 16 classes, the data set has 7\.\n  Fix: "
    ) as caught:
        run(tmp_path / "c.zarr", Pixels(50, num_classes=7))
    assert caught.value.exit_code == 4
    assert os.listdir(tmp_path) == []


def test_labels_are_kept_and_may_be_absent(tmp_path: Path) -> None:
    run(tmp_path / "l.zarr", Pixels(50, num_classes=16))
    run(tmp_path / "u.zarr", Pixels(50))
    assert np.array_equal(open_cache(tmp_path / "l.zarr").labels, np.arange(50) % 16)
    assert np.array_equal(open_cache(tmp_path / "u.zarr").labels, np.full(50, -1))


def test_teachers_of_different_class_counts_share_unlabelled_images(tmp_path: Path) -> None:
    path = tmp_path / "c.zarr"
    teachers = {"few": teacher(TOP2), "many": teacher(DENSE32)}
    result = precompute(
        recipe(path, teachers=teachers), teachers={"few": Linear(5), "many": Linear(33)}, dataset=Pixels(60)
    )
    assert (result.views, result.teacher_passes) == (120, 240)
    rows = open_cache(path).rows([ViewKey(0, 59)])
    assert rows["few"].logits.num_classes == 5  # type: ignore[union-attr]
    assert rows["many"].logits.shape == (1, 33)  # type: ignore[union-attr]


@pytest.mark.parametrize("content", ["file", "folder", "link", "other zarr", "creating is a file"])
def test_what_is_no_cache_is_never_overwritten(content: str, tmp_path: Path) -> None:
    path = tmp_path / "mine"
    if content == "file":
        path.write_text("precious")
    elif content == "folder":
        path.mkdir()
        (path / "thesis.tex").write_text("precious")
    elif content == "link":
        path.symlink_to(tmp_path / "nowhere")
    elif content == "other zarr":
        path.mkdir()
        (path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    else:
        (tmp_path / "mine.creating").write_text("precious")
    before = stamps(tmp_path)
    with pytest.raises(CacheError) as caught:
        run(path, Pixels(20))
    assert caught.value.exit_code == 3
    assert stamps(tmp_path) == before


def test_an_empty_directory_may_become_a_cache(tmp_path: Path) -> None:
    (tmp_path / "c.zarr").mkdir()
    run(tmp_path / "c.zarr", Pixels(20))
    assert open_cache(tmp_path / "c.zarr").complete
    assert os.listdir(tmp_path) == ["c.zarr"]


@pytest.mark.parametrize("exists", [True, False])
def test_a_second_writer_is_refused_at_once(exists: bool, tmp_path: Path) -> None:
    path = tmp_path / "c.zarr"
    if exists:
        partial(path)
    with writer_lock(path), pytest.raises(CacheError, match="is being written by another precompute") as caught:
        run(path, Pixels(NUM_IMAGES), shard_rows=128)
    assert caught.value.exit_code == 3
    assert run(path, Pixels(NUM_IMAGES), shard_rows=128).shards == 6


def test_a_worker_that_outlives_its_parent_holds_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "c.zarr"
    go_on, end = os.pipe()
    with writer_lock(path):
        child = os.fork()
        if child == 0:
            os.close(end)
            os.read(go_on, 1)
            os._exit(0)
    try:
        with writer_lock(path):
            pass
    finally:
        os.close(end)
        os.waitpid(child, 0)
        os.close(go_on)


def test_a_run_that_fails_before_its_cache_exists_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RecipeError):
        run(tmp_path / "c.zarr", Pixels(20), shard_rows=7)
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


def truncated(root: Path, name: str = "bee/012.png") -> bytes:
    data = (root / name).read_bytes()
    (root / name).write_bytes(data[: len(data) // 2])
    return data


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
    done = Cache(path, read_manifest(path)).shards
    assert len(done) == 3
    before = stamps(path)
    (many / name).write_bytes(data)
    assert run(path, None, Linear(2), **changes).shards_written == 10 - len(done)
    after = stamps(path)
    kept = [f"t.commits/c.{shard.view}.{shard.start // 40}.0.0" for shard in done]
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
    assert len(Cache(path, read_manifest(path)).shards) >= 5
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
        self.inner, self.spoil, self.left = Linear(), spoil, after

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
    "a tuple": (lambda answers: (answers, answers), r"returned a tuple, not logits"),
    "a dict": (lambda answers: {"logits": answers}, r"returned a dict, not logits"),
    "too few rows": (lambda answers: answers[:-1], "returns 49 rows of logits for 50 images"),
    "one row": (lambda answers: answers[:1], "returns 1 rows of logits for 50 images"),
    "other columns": (lambda answers: answers[:, :1], "returns 1 logits for image '00050', and 16 before"),
    "maps": (lambda answers: answers[:, :, None], r"returned \[50, 16, 1\], not logits"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_wrong_answer_stops_the_run_and_is_not_stored(name: str, tmp_path: Path) -> None:
    path = tmp_path / "c.zarr"
    spoil, message = SPOILT[name]
    with pytest.raises(LogitCacheError, match=message) as caught:
        run(path, Pixels(NUM_IMAGES), Wrong(spoil, after=2), shard_rows=128)
    assert caught.value.exit_code == 2
    assert Cache(path, read_manifest(path)).shards == []


def test_top_k_refuses_answers_that_are_not_finite_even_where_it_drops_them(tmp_path: Path) -> None:
    module = Wrong(at(-float("inf")), after=1)
    with pytest.raises(DataError, match="answers image '00003'"):
        run(tmp_path / "c.zarr", Pixels(60), module, teachers={"t": teacher(TOP2)})


def test_a_lower_precision_is_close_and_recorded(tmp_path: Path) -> None:
    network = small_cnn(4, 1, 16, 3)
    dataset = Pixels(60, side=8)
    views = {"num_views": 1}
    for precision in ("float32", "bfloat16"):
        path = tmp_path / precision
        teachers = {"t": teacher(DENSE32, precision=precision)}
        run(path, dataset, network, teachers=teachers, views=views)
        assert open_cache(path).manifest.teachers["t"].precision == precision
    keys = [ViewKey(0, index) for index in range(60)]
    [full], [half] = (raw(open_cache(tmp_path / p).rows(keys)["t"].logits) for p in ("float32", "bfloat16"))
    assert not np.array_equal(full, half)
    np.testing.assert_allclose(full, half, atol=0.05)


def test_workers_and_batches_do_not_change_a_byte(tmp_path: Path) -> None:
    expected = whole(tmp_path / "plain")
    for number, changes in enumerate(
        (
            {"num_workers": 2, "start_method": "fork"},
            {"batch_size": 1},
            {"batch_size": 7},
            {"batch_size": 128},
            {"batch_size": 10_000},
            {"num_workers": 2, "start_method": "fork", "batch_size": 33},
        )
    ):
        assert whole(tmp_path / str(number), **changes) == expected


def test_workers_that_are_started_afresh_write_the_same_bytes(tmp_path: Path) -> None:
    expected = whole(tmp_path / "plain")
    assert whole(tmp_path / "other", num_workers=1, start_method="forkserver") == expected


def test_the_callers_module_stays_trainable(tmp_path: Path) -> None:
    module = Linear()
    run(tmp_path / "c.zarr", Pixels(20), module)
    assert module.weight.requires_grad
    assert module.weight.grad is None


def test_global_random_states_are_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[union-attr,index]
    run(tmp_path / "c.zarr", Pixels(20))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[union-attr,index]


def test_the_manifest_names_no_object_that_was_passed_in_place_of_an_entry(tmp_path: Path) -> None:
    root = folder(tmp_path / "images")
    named = {"t": teacher(model={"kind": "small_cnn"})}
    run(tmp_path / "c.zarr", Pixels(40), dataset=entry(root), teachers=named)
    manifest = open_cache(tmp_path / "c.zarr").manifest
    assert manifest.dataset is None
    assert manifest.teachers["t"].model is None
    run(tmp_path / "d.zarr", ImageFolder(root=str(root)), Linear(2))
    assert open_cache(tmp_path / "d.zarr").manifest.dataset == ImageFolder(root=str(root))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teachers": {"t": teacher(TOP2 | {"k": 17})}}, "top_k keeps k = 17 of 16 classes"),
        ({"shard_rows": 100}, "shard_rows = 100.*Fix: shard_rows: 128"),
        ({"device": "cuda:77"}, "cuda:77"),
        ({"teachers": {"t": teacher(preprocessing=None)}}, "how its pixels were normalised"),
        ({"teachers": {"other": teacher()}}, r"teachers \['t'\] were given, but the recipe names \['other'\]"),
        ({"teachers": {"t": teacher(), "u": teacher()}}, "teachers.u names no model"),
    ],
)
def test_a_recipe_that_cannot_be_carried_out_is_refused(changes: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        run(tmp_path / "c.zarr", Pixels(40), **changes)
    assert caught.value.exit_code == 2
    assert os.listdir(tmp_path) == []


def test_a_recipe_without_a_data_set_says_so(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="names no data set"):
        run(tmp_path / "c.zarr")


def test_a_default_size_of_shards_continues_a_cache_of_another(tmp_path: Path) -> None:
    partial(tmp_path / "c.zarr")
    assert run(tmp_path / "c.zarr", Pixels(NUM_IMAGES)).shards_written == 5


def test_weights_in_a_file_take_their_classes_from_the_labels(tmp_path: Path) -> None:
    save_weights(tmp_path / "w.safetensors", small_cnn(4, 1, 3, 3))
    model = {
        "kind": "checkpoint",
        "path": str(tmp_path / "w.safetensors"),
        "model": {"kind": "small_cnn", "width": 4},
    }
    plan = recipe(tmp_path / "c.zarr", teachers={"t": teacher(model=model)}, views={"num_views": 1})
    precompute(plan, dataset=Pixels(40, num_classes=3, side=8))
    assert open_cache(tmp_path / "c.zarr").manifest.teachers["t"].num_classes == 3


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


def test_a_stop_keeps_committed_shards_and_its_exit_code(tmp_path: Path) -> None:
    class Signalling(Linear):
        calls = 0

        def forward(self, images: Tensor) -> Tensor:
            self.calls += 1
            if self.calls == 6:
                signal.raise_signal(signal.SIGTERM)
            return super().forward(images)

    with pytest.raises(Stopped, match="1 of the 6 shards") as caught:
        run(tmp_path / "c.zarr", Pixels(NUM_IMAGES), Signalling(), shard_rows=128)
    assert caught.value.exit_code == 75
    assert run(tmp_path / "c.zarr", Pixels(NUM_IMAGES), shard_rows=128).shards_written == 5
    assert contents(tmp_path / "c.zarr") == whole(tmp_path / "w.zarr")
