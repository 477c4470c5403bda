"""What precompute refuses to continue, or to begin."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from logitcache.cache.cache import open_cache
from logitcache.errors import CacheError, DataError, MismatchError, RecipeError
from logitcache.stage_one.precompute import precompute
from logitcache.views.datasets import ImageFolder
from tests.cache.made import DENSE16, DENSE32, FLIP_AND_CROP, TOP2, Linear, Pixels, recipe, run, stamps, teacher
from tests.stage_one.runs import NUM_IMAGES, Stopping, entry, folder, partial, whole


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
    "more views of another seed": (
        {"views": {"num_views": 3, "seed": 4, "augmentations": FLIP_AND_CROP}},
        "seed.* 3.* 4",
    ),
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teachers": {"t": teacher(TOP2 | {"k": 17})}}, "top_k keeps k = 17 of 16 classes"),
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


def test_classes_in_another_order_are_refused(tmp_path: Path) -> None:
    images = Pixels(NUM_IMAGES, 16)
    images.classes = [f"class {number}" for number in range(16)]  # type: ignore[attr-defined]
    whole(tmp_path / "c.zarr", images)
    images.classes.reverse()  # type: ignore[attr-defined]
    with pytest.raises(MismatchError, match="names of the classes") as caught:
        run(tmp_path / "c.zarr", images, shard_rows=128)
    assert caught.value.exit_code == 4
