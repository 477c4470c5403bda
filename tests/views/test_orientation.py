"""The EXIF orientation of photographs: ignored as torchvision does and counted, or applied as viewers do."""

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from pydantic import TypeAdapter

from logitcache.cli import main
from logitcache.config.recipe import dump_recipe
from logitcache.student.training import train
from logitcache.views.datasets import Dataset, open_dataset
from logitcache.views.datasets.base import ImageDataset, fingerprint, warn_of_orientation
from tests.cache.made import Linear, recipe, run
from tests.student.small import teacher as trained
from tests.views.archives import tarred, written

ADAPTER: TypeAdapter[Dataset] = TypeAdapter(Dataset)
PIXELS = np.random.default_rng(0).integers(0, 256, (8, 6, 3), dtype=np.uint8)
FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "TIFF": "tif"}
TURNED = 7 * 3
"""Orientations other than 1, of all formats but TIFF, which Pillow turns itself."""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


def photograph(orientation: int | None, form: str = "JPEG") -> bytes:
    file, exif = io.BytesIO(), Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    Image.fromarray(PIXELS).save(file, form, **({} if orientation is None else {"exif": exif}))
    return file.getvalue()


FILES = {
    f"{form}{orientation}.{ending}": photograph(orientation, form)
    for form, ending in FORMATS.items()
    for orientation in range(1, 9)
} | {
    "none.jpg": photograph(None),
    "odd.jpg": photograph(77),
    "broken.jpg": photograph(6).replace(b"Exif\0\0MM\0*", b"Exif\0\0XX\0*").replace(b"Exif\0\0II*\0", b"Exif\0\0XX*\0"),
}


def images(folder: Path, kind: str, **fields: str) -> ImageDataset:
    if kind == "webdataset":
        written(folder, "a.tar", tarred(sorted(FILES.items())))
        return open_dataset(ADAPTER.validate_python({"kind": kind, "shards": str(folder / "a.tar"), **fields}))
    for name, data in FILES.items():
        written(folder / "in", name, data)
    root = f"file://{folder}/in" if kind == "remote" else str(folder / "in")
    return open_dataset(ADAPTER.validate_python({"kind": "image_folder", "root": root, **fields}))


def shown(data: bytes, apply: bool) -> np.ndarray:
    """What Pillow decodes, turned by Pillow's own function or not at all."""
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return np.asarray(ImageOps.exif_transpose(image) if apply else image)


@pytest.mark.parametrize("kind", ["image_folder", "remote", "webdataset"])
@pytest.mark.parametrize("orientation", ["ignore", "apply"])
def test_pixels_and_sizes_are_those_of_pillow(tmp_path: Path, kind: str, orientation: str) -> None:
    dataset = images(tmp_path, kind, orientation=orientation)
    contents = {name.partition(".")[0]: data for name, data in FILES.items()}
    sizes = dataset.sizes()
    for index, name in enumerate(dataset.ids):
        data = contents[name.partition(".")[0]]
        wanted = shown(data, orientation == "apply" and not name.startswith("broken"))
        assert np.array_equal(dataset.read(index).permute(1, 2, 0).numpy(), wanted), name
        assert tuple(sizes[index]) == wanted.shape[:2], name
    assert len(set(map(tuple, sizes.tolist()))) == 2  # at least TIFF


@pytest.mark.parametrize("kind", ["image_folder", "remote", "webdataset"])
def test_what_is_ignored_is_counted_and_named_and_the_fix_mends_it(tmp_path: Path, kind: str) -> None:
    ignoring = images(tmp_path, kind)
    with pytest.warns(UserWarning, match=f"{TURNED} of {len(FILES)} images, such as 'JPEG2") as caught:
        warn_of_orientation(ignoring)
    assert str(caught[0].message).endswith("Fix: `orientation: apply` in `dataset:`")
    applying = images(tmp_path, kind, orientation="apply")
    warn_of_orientation(applying)  # is an error in tests
    old, new = fingerprint(ignoring), fingerprint(applying)
    assert old == new.model_copy(update={"sizes": old.sizes}) != new


def test_the_stored_form_names_what_is_applied_alone() -> None:
    entry = {"kind": "image_folder", "root": "in"}
    assert "orientation" not in ADAPTER.dump_python(ADAPTER.validate_python(entry | {"orientation": "ignore"}))
    assert ADAPTER.dump_python(ADAPTER.validate_python(entry | {"orientation": "apply"}))["orientation"] == "apply"


def test_stage_one_plan_and_train_teacher_warn(tmp_path: Path) -> None:
    for label in ("a", "b"):
        for number in range(4):
            written(tmp_path / "in" / label, f"{number}.jpg", photograph(3))
    folder = {"kind": "image_folder", "root": str(tmp_path / "in")}
    plain = {"num_views": 1, "augmentations": [{"kind": "center_crop", "size": 4}]}
    with pytest.warns(UserWarning, match="8 of 8 images"):
        run(tmp_path / "c", dataset_of(folder), Linear(2), views=plain)
    entry = trained(tmp_path / "run", dataset=folder, augmentations=plain["augmentations"], batch_size=4)
    with pytest.warns(UserWarning, match="8 of 8 images"):
        train(entry)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(tmp_path / "d", dataset_of(folder | {"orientation": "apply"}), Linear(2), views=plain)
    assert main(["verify", str(tmp_path / "d")]) == 0
    assert "orientation: apply" in dump_recipe(recipe(tmp_path / "e", dataset=folder | {"orientation": "apply"}))


def dataset_of(entry: dict[str, str]) -> Dataset:
    return ADAPTER.validate_python(entry)
