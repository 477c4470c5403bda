"""Image folders: every format, every mode, and what is refused."""

import os
import unicodedata
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets
from torchvision.transforms.v2.functional import pil_to_tensor

from logitcache.cache.replay import _opened
from logitcache.config.recipe import require_effect
from logitcache.errors import DataError, RecipeError
from logitcache.runtime.console import configure
from logitcache.stage_one.precompute import PrecomputeRecipe
from logitcache.store import digest_index
from logitcache.views.datasets import ImageFolder
from logitcache.views.datasets.base import fingerprint
from logitcache.views.datasets.fingerprint_diff import explain_difference

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 10, 4), dtype=np.uint8)
RGB = Image.fromarray(PIXELS[..., :3])
FORMATS = {
    "rgb.jpg": RGB,
    "rgb.JPEG": RGB,
    "grey.jpg": RGB.convert("L"),
    "cmyk.jpg": RGB.convert("CMYK"),
    "rgb.png": RGB,
    "bits.png": RGB.convert("1"),
    "grey.png": RGB.convert("L"),
    "grey_alpha.png": RGB.convert("LA"),
    "palette.png": RGB.quantize(32),
    "alpha.png": Image.fromarray(PIXELS),
    "rgb.webp": RGB,
    "alpha.webp": Image.fromarray(PIXELS),
    "rgb.bmp": RGB,
    "rgb.tif": RGB,
    "cmyk.tiff": RGB.convert("CMYK"),
    "rgb.ppm": RGB,
    "grey.pgm": RGB.convert("L"),
}


def save(image: Image.Image, path: Path, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def opened(root: Path, **fields: object):
    return ImageFolder(root=str(root), **fields).open()


def read_one(root: Path, **fields: object) -> torch.Tensor:
    dataset = opened(root, labelled=False, **fields)
    assert len(dataset.ids) == 1
    return dataset.read(0)


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    for number, name in enumerate(("dog/b.png", "dog/a.png", "cat/z.PNG", "cat/in/a.png")):
        save(Image.new("RGB", (4, 4), (number, 0, 0)), tmp_path / name)
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    return tmp_path


def test_every_format_has_the_pixels_and_the_order_of_torchvision(tmp_path: Path) -> None:
    for number, (name, image) in enumerate(FORMATS.items()):
        save(image, tmp_path / f"class{number % 3}" / ("nested" if number % 2 else "") / name)
    theirs = datasets.ImageFolder(str(tmp_path))
    ours = opened(tmp_path)
    assert list(ours.ids) == [Path(path).relative_to(tmp_path).as_posix() for path, _ in theirs.imgs]
    assert ours.labels.tolist() == theirs.targets
    assert list(ours.class_names) == theirs.classes
    for index in range(len(theirs)):
        pixels = ours.read(index)
        assert torch.equal(pixels, pil_to_tensor(theirs[index][0])), ours.ids[index]


def test_sizes_are_those_of_the_decoded_images(tmp_path: Path) -> None:
    for name, image in FORMATS.items():
        save(image, tmp_path / name)
    frames = [Image.new("RGB", (5, 6), colour) for colour in ("red", "blue")]
    save(frames[0], tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    for name in ("turned.jpg", "turned.png", "turned.webp", "turned.tif"):
        save(RGB, tmp_path / name, exif=exif)
    dataset = opened(tmp_path)
    read = [tuple(dataset.read(index).shape[1:]) for index in range(len(dataset.ids))]
    assert dataset.sizes().dtype == np.int64
    assert list(map(tuple, dataset.sizes().tolist())) == read
    assert {(12, 10), (6, 5)} <= set(read)


def test_sizes_are_read_from_heads_once_until_a_file_changes(pets: Path, tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("home")))
    now = digest_index.now_ns
    monkeypatch.setattr(digest_index, "now_ns", lambda: now() + 3_600_000_000_000)
    path = pets / "dog" / "a.png"
    path.write_bytes(path.read_bytes()[:-20])
    before = opened(pets).sizes()
    assert before.tolist() == [[4, 4]] * 4
    digests = opened(pets).digests()
    seen: list[str] = []
    original = Image.open
    monkeypatch.setattr(Image, "open", lambda file, **options: seen.append(file.name) or original(file, **options))
    assert np.array_equal(opened(pets).sizes(), before)
    assert seen == []
    save(Image.new("RGB", (9, 3)), path)
    assert opened(pets).sizes()[2].tolist() == [3, 9]
    assert seen == [str(path)]
    assert (opened(pets).digests() != digests).tolist() == [False, False, True, False]


def test_image_whose_size_cannot_be_read_is_refused_by_name(pets: Path) -> None:
    (pets / "dog" / "a.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(DataError, match=r"dog/a\.png' cannot be read: cannot identify") as error:
        opened(pets).sizes()
    assert "Fix:" in str(error.value)


def test_the_stored_form_names_the_decoder() -> None:
    assert ImageFolder(root="pets").model_dump()["decoder"] == "pillow"


@pytest.mark.parametrize("name", FORMATS)
def test_grey_mode_is_what_pillow_converts_to(tmp_path: Path, name: str) -> None:
    path = save(FORMATS[name], tmp_path / name)
    with Image.open(path) as image:
        assert torch.equal(read_one(tmp_path, mode="L"), pil_to_tensor(image.convert("L")))


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_palette_with_transparency_keeps_its_colours(tmp_path: Path, mode: str) -> None:
    path = save(RGB.quantize(16), tmp_path / "a.png", transparency=bytes(range(16)))
    with Image.open(path) as image:
        expected = pil_to_tensor(image.convert(mode))
    assert torch.equal(read_one(tmp_path, mode=mode), expected)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm", "big_endian.tif", "wide.tif"])
def test_sixteen_bit_grey_is_scaled_and_never_clipped(tmp_path: Path, name: str, mode: str) -> None:
    values = np.linspace(0, 65535, 120).astype(np.uint16).reshape(12, 10)
    dtype = {"big_endian.tif": ">u2", "wide.tif": "<i4"}.get(name, "<u2")
    save(Image.fromarray(values.astype(dtype)), tmp_path / name)
    pixels = read_one(tmp_path, mode=mode)
    assert pixels.shape == (len(mode), 12, 10)
    assert all(np.array_equal(channel, values >> 8) for channel in pixels.numpy())


def test_first_frame_of_a_gif_is_read(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (5, 5), colour) for colour in ("red", "blue")]
    save(frames[0], tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert read_one(tmp_path)[:, 0, 0].tolist() == [255, 0, 0]


def test_orientation_of_exif_is_not_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    save(RGB, tmp_path / "a.jpg", exif=exif)
    assert read_one(tmp_path).shape == (3, 12, 10)


def test_ids_are_paths_and_hidden_files_are_left_out(pets: Path) -> None:
    save(RGB, pets / ".trash" / "a.png")
    (pets / "cat" / "._z.png").write_bytes(b"resource fork")
    dataset = opened(pets)
    assert list(dataset.ids) == ["cat/z.PNG", "cat/in/a.png", "dog/a.png", "dog/b.png"]
    assert dataset.labels.tolist() == [0, 0, 1, 1]
    assert (dataset.num_classes, dataset.class_names) == (2, ("cat", "dog"))


def test_names_that_are_not_utf_8_can_be_read_and_told_apart(tmp_path: Path) -> None:
    save(RGB, tmp_path / "a.png")
    os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/\xff.png")
    dataset = opened(tmp_path)
    assert torch.equal(dataset.read(0), pil_to_tensor(RGB))
    assert len(fingerprint(dataset).ids) == 64


@pytest.mark.parametrize("labelled", [None, False])
def test_flat_folder_has_no_labels(tmp_path: Path, labelled: bool | None, capsys: pytest.CaptureFixture[str]) -> None:
    configure()
    for name in ("b.png", "a.png"):
        save(RGB, tmp_path / name)
    (tmp_path / "notes").mkdir()
    dataset = opened(tmp_path, labelled=labelled)
    assert list(dataset.ids) == ["a.png", "b.png"]
    assert dataset.labels.tolist() == [-1, -1]
    assert (dataset.num_classes, dataset.class_names) == (None, None)
    warned = "has no class folders, so that its 2 images have no labels" in capsys.readouterr().err
    assert warned == (labelled is None)


def test_a_flat_folder_that_is_to_be_labelled_is_refused_and_both_fixes_open_it(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    save(RGB, root / "a.png")
    with pytest.raises(DataError, match=r"labelled: true.\n  Fix: correct root, or set labelled: false"):
        opened(root, labelled=True)
    assert opened(root, labelled=False).labels.tolist() == [-1]
    (tmp_path / "classes").mkdir()
    root.rename(tmp_path / "classes" / "cat")
    assert opened(tmp_path / "classes", labelled=True).labels.tolist() == [0]


def test_a_manifest_of_the_first_release_opens_a_flat_folder(tmp_path: Path) -> None:
    """It recorded `labelled: true` by default, also where there were no labels."""
    save(RGB, tmp_path / "a.png")
    assert _opened(ImageFolder(root=str(tmp_path), labelled=True), 1).labels.tolist() == [-1]


def test_without_labels_every_image_below_the_root_is_taken(pets: Path) -> None:
    save(RGB, pets / "loose.png")
    dataset = opened(pets, labelled=False)
    assert list(dataset.ids) == [
        "loose.png",
        *("cat/z.PNG", "cat/in/a.png", "dog/a.png", "dog/b.png"),
    ]
    assert set(dataset.labels.tolist()) == {-1}


def test_moved_folder_is_the_same_data_set(pets: Path, tmp_path_factory) -> None:
    before = fingerprint(opened(pets))
    elsewhere = tmp_path_factory.mktemp("moved") / "pets"
    os.rename(pets, elsewhere)
    assert fingerprint(opened(elsewhere)) == before


def test_one_changed_byte_changes_the_content_only(pets: Path) -> None:
    before = fingerprint(opened(pets))
    path = pets / "dog" / "a.png"
    path.write_bytes(path.read_bytes() + b"\0")
    after = fingerprint(opened(pets))
    assert before.content != after.content
    assert before == after.model_copy(update={"content": before.content})


def refused(root: Path, *messages: str, **fields: object) -> None:
    with pytest.raises(DataError) as error:
        opened(root, **fields)
    for message in (*messages, "Fix:"):
        assert message in str(error.value)


def test_roots_without_images_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "none", "none' does not exist")
    refused(tmp_path, "no images")
    refused(tmp_path, "no images", labelled=False)
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "is a file, not a folder")


def test_loose_image_beside_class_folders_is_refused_by_name(pets: Path) -> None:
    save(RGB, pets / "loose.png")
    refused(pets, "'cat'", "'loose.png'", "labelled: false")


def test_class_folder_without_an_image_is_refused_by_name(pets: Path) -> None:
    (pets / "bird" / "deep").mkdir(parents=True)
    refused(pets, "'bird'")


def test_folder_of_splits_is_refused(tmp_path: Path) -> None:
    for name in ("train/cat/a.png", "val/cat/a.png"):
        save(RGB, tmp_path / name)
    refused(tmp_path, "splits ('train', 'val')", f"root: {tmp_path / 'train'}")


def test_image_of_a_type_that_is_not_read_is_refused_by_name(pets: Path) -> None:
    (pets / "cat" / "phone.HEIC").write_bytes(b"")
    refused(pets, "phone.HEIC", "convert")


def test_link_that_leads_back_is_refused(pets: Path) -> None:
    (pets / "cat" / "again").symlink_to(pets, target_is_directory=True)
    refused(pets, "again", "remove the link")


def test_linked_folders_and_files_are_read(pets: Path, tmp_path_factory) -> None:
    root = tmp_path_factory.mktemp("links")
    (root / "cat").symlink_to(pets / "cat", target_is_directory=True)
    (root / "dog").mkdir()
    (root / "dog" / "a.png").symlink_to(pets / "dog" / "a.png")
    dataset = opened(root)
    assert list(dataset.ids) == ["cat/z.PNG", "cat/in/a.png", "dog/a.png"]
    assert torch.equal(dataset.read(2), opened(pets).read(2))


def unreadable(path: Path, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        opened(path.parent, labelled=False).read(0)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.bmp", "a.tif", "a.ppm", "a.gif"])
@pytest.mark.parametrize("left", [0, 0.02, 0.6])
def test_truncated_image_is_refused_by_name(tmp_path: Path, name: str, left: float) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = save(Image.fromarray(noise), tmp_path / name)
    data = path.read_bytes()
    path.write_bytes(data[: int(left * len(data))])
    unreadable(path, "cannot be read")


def test_text_and_postscript_under_an_image_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_text("<html>404</html>")
    unreadable(path, "cannot identify")
    RGB.save(path, "EPS")
    unreadable(path, "cannot identify")


def test_floats_and_integers_above_16_bits_are_refused(tmp_path: Path) -> None:
    path = save(Image.fromarray(np.ones((4, 4), np.float32)), tmp_path / "a.tif")
    unreadable(path, "floating-point")
    save(Image.fromarray(np.full((4, 4), 70_000, np.int32)), path)
    unreadable(path, "70000")


def test_file_that_vanished_is_refused_by_name(tmp_path: Path) -> None:
    path = save(RGB, tmp_path / "a.png")
    dataset = opened(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=r"a\.png' cannot be read: No such file"):
        dataset.read(0)
    with pytest.raises(DataError, match=r"a\.png' cannot be read: No such file"):
        dataset.digests()


def test_decompression_bomb_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(RGB, tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    unreadable(path, "scale it down")


@pytest.mark.parametrize(("recorded", "here"), [("NFC", "NFD"), ("NFD", "NFC")])
@pytest.mark.parametrize("knows_digests", [True, False])
def test_names_in_another_unicode_form_are_explained_and_the_fix_mends_it(
    tmp_path: Path, recorded: Literal["NFC", "NFD"], here: Literal["NFC", "NFD"], knows_digests: bool
) -> None:
    # Without digests of the images only names that sort alike in both forms are found again.
    names = (
        ["caf\u00e9/\u00fc.png", "caf\u00e9/z.png", "cafz/a.png"]
        if knows_digests
        else ["\u00e9/\u00fc.png", "\u00ef/a.png"]
    )
    for form in ("NFC", "NFD"):
        for number, name in enumerate(names):
            save(Image.new("RGB", (4, 4), (number, 0, 0)), tmp_path / form / unicodedata.normalize(form, name))
    then, now = opened(tmp_path / recorded), opened(tmp_path / here)
    digests = then.digests() if knows_digests else None
    text = explain_difference(fingerprint(then), digests, now)
    assert f"the same images under the same names in another Unicode form: recorded in {recorded}, here in" in text
    assert f"Fix: rename files and folders to {recorded}, as `convmv -f utf8 -t utf8 --{recorded.lower()} -r" in text
    for path in sorted((tmp_path / here).rglob("*"), reverse=True):  # what convmv does
        path.rename(path.with_name(unicodedata.normalize(recorded, path.name)))
    assert explain_difference(fingerprint(then), digests, opened(tmp_path / here)) == ""


def test_other_images_under_such_names_are_not_taken_for_the_same(tmp_path: Path) -> None:
    save(RGB, tmp_path / "then" / "a" / "\u00e9.png")
    save(RGB.convert("L"), tmp_path / "now" / "a" / "e\u0301.png")
    then = opened(tmp_path / "then")
    text = explain_difference(fingerprint(then), then.digests(), opened(tmp_path / "now"))
    assert "Unicode" not in text
    assert "Fix: point the data set at the same images" in text


@pytest.mark.parametrize(("fields", "held_out"), [({}, [0, 10, 20]), ({"holdout": 2}, list(range(0, 25, 2)))])
def test_a_split_holds_out_images_in_order_and_keeps_classes(
    tmp_path: Path, fields: dict[str, object], held_out: list[int]
) -> None:
    for number in range(25):
        save(Image.new("RGB", (4, 4), (number, 0, 0)), tmp_path / f"class{number % 3}" / f"{number:02}.png")
    every = opened(tmp_path)
    validation, train = (opened(tmp_path, split=split, **fields) for split in ("validation", "train"))
    assert list(validation.ids) == [every.ids[index] for index in held_out]
    assert sorted([*validation.ids, *train.ids]) == sorted(every.ids)
    assert validation.class_names == train.class_names == every.class_names
    for part in (train, validation):
        assert part.labels.tolist() == [every.labels[list(every.ids).index(name)] for name in part.ids]
        assert torch.equal(part.read(1), every.read(list(every.ids).index(part.ids[1])))


def test_a_split_of_one_image_and_a_holdout_of_no_split_are_refused(tmp_path: Path) -> None:
    save(RGB, tmp_path / "a.png")
    with pytest.raises(DataError, match="leave out split"):
        opened(tmp_path, labelled=False, split="train")
    with pytest.raises(RecipeError, match=r"dataset has holdout 5 and no split"):
        require_effect(PrecomputeRecipe(cache="c", dataset=ImageFolder(root="a", holdout=5)))


def test_an_entry_without_split_is_stored_as_before() -> None:
    assert ImageFolder(root="a").model_dump() == {
        **{"kind": "image_folder", "root": "a", "mode": "RGB", "labelled": None, "decoder": "pillow"},
    }
