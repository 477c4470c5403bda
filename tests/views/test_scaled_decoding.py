"""Scaled decoding: no crop lacks pixels, by brute force; pixels are those of another decoder; other files are whole."""

import io
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter

from logitcache.config.recipe import load_recipe
from logitcache.errors import RecipeError
from logitcache.student.training_recipes import TeacherRecipe
from logitcache.views import canaries
from logitcache.views.datasets import Bundled, Dataset, ImageFolder, open_dataset
from logitcache.views.datasets.base import fingerprint, read_images
from logitcache.views.keys import Draws, ViewKey
from logitcache.views.spec import Views, ViewSpec
from tests.objects import bucket
from tests.views.archives import tarred, written
from tests.views.examples import EXAMPLES
from tests.views.images import Images, textured

CROP = {"kind": "random_resized_crop", "size": 16, "scale": [0.25, 1.0]}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


def spec(*augmentations: dict[str, Any], **changes: Any) -> ViewSpec:
    return load_recipe({"decode": "scaled", "augmentations": augmentations, "num_views": 4, **changes}, ViewSpec)


def picture(height: int, width: int, mode: str = "RGB") -> Image.Image:
    return Image.fromarray(textured(1, height, width)[0].permute(1, 2, 0).numpy()).convert(mode)


def saved(image: Image.Image, form: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def lossless(pixels: np.ndarray) -> bytes:
    """Encode grey as lossless JPEG (ITU T.81, H): differences to the left neighbour, all classes in codes of 5 bits."""
    left = np.concatenate([np.r_[128, pixels[:-1, 0]][:, None], pixels[:, :-1]], axis=1).astype(int)
    bits = ""
    for difference in (pixels - left).ravel().tolist():
        size = abs(difference).bit_length()
        low = difference if difference > 0 else difference + (1 << size) - 1
        bits += f"{size:05b}" + (f"{low:0{size}b}" if size else "")
    bits += "1" * (-len(bits) % 8)
    coded = bytes(int(bits[at : at + 8], 2) for at in range(0, len(bits), 8)).replace(b"\xff", b"\xff\0")
    frame = b"\xff\xc3\0\x0b\x08" + np.array(pixels.shape, ">u2").tobytes() + b"\x01\x01\x11\0"
    codes = b"\xff\xc4\0\x1c\0" + bytes([0, 0, 0, 0, 9, *[0] * 11, *range(9)])
    return b"\xff\xd8" + frame + codes + b"\xff\xda\0\x08\x01\x01\0\x01\0\0" + coded + b"\xff\xd9"


class Extremes:
    """Draws of the smallest and the largest words, in every combination for area and ratio."""

    def words(self, stream: str, ordinal: int, count: int) -> np.ndarray:
        rows = [[a] * 10 + [r] * 10 + [0, 0] for a, r in itertools.product((0, 2**32 - 1), repeat=2)]
        return np.array(rows, np.uint64)[:, :count]


@pytest.mark.parametrize("size", [16, [24, 9], [1, 1]])
@pytest.mark.parametrize("scale", [[0.08, 1.0], [0.25, 1.0], [0.5, 0.6], [1.0, 1.0]])
@pytest.mark.parametrize("ratio", [[0.75, 1.3333333333333333], [0.3, 3.3], [1.0, 1.0], [2.0, 3.0]])
def test_the_smallest_crop_keeps_the_pixels_of_the_result(size: Any, scale: Any, ratio: Any) -> None:
    views = spec({"kind": "random_resized_crop", "size": size, "scale": scale, "ratio": ratio})
    sides = [*range(1, 40), 47, 63, 64, 65, 99, 128, 301, 640]
    sizes = np.array(list(itertools.product(sides, repeat=2)))
    factors = views.factors(sizes)
    assert set(factors.tolist()) <= {1, 2, 4, 8}
    reduced = -(-sizes // factors[:, None])
    wanted = np.array([size, size] if isinstance(size, int) else size)
    (crop,) = views.augmentations
    for view in range(8):
        keys = [ViewKey(view, index) for index in range(len(sizes))]
        params, _ = crop.plan(Draws.of(view, keys), 0, reduced)
        assert (params[factors > 1, 2:] >= wanted).all()
    for row in np.flatnonzero(factors > 1)[:: max(1, (factors > 1).sum() // 60)]:
        params, _ = crop.plan(Extremes(), 0, np.tile(reduced[row], (4, 1)))  # type: ignore[arg-type]
        assert (params[:, 2:] >= wanted).all()


def test_images_are_reduced_as_far_as_the_crops_allow() -> None:
    views = spec({"kind": "random_resized_crop", "size": 224, "scale": [0.25, 1.0]})
    sizes = np.array([[3000, 4000], [1500, 2000], [750, 1000], [6000, 8000], [375, 500], [517, 518]])
    # A quarter of the area in the ratio 3:4 has sides of sqrt(3/16) = 0.433 of the image's geometric mean.
    expected = [
        max(f for f in (1, 2, 4, 8) if f == 1 or round(math.sqrt(h * w / f / f * 3 / 16)) >= 224) for h, w in sizes
    ]
    assert views.factors(sizes).tolist() == expected == [4, 2, 1, 8, 1, 1]


def test_a_resize_keeps_its_shorter_side_or_both_sides() -> None:
    sizes = np.array([[2047, 9000], [2048, 2048], [512, 511], [512, 512], [7, 9000]])
    shorter = spec({"kind": "horizontal_flip"}, {"kind": "resize", "size": 256}, {"kind": "center_crop", "size": 224})
    assert shorter.factors(sizes).tolist() == [8, 8, 2, 2, 1]  # 2047 / 8 and 511 / 2 are rounded up
    assert spec({"kind": "resize", "size": [256, 512]}).factors(sizes).tolist() == [8, 4, 1, 1, 1]
    tiny = spec({"kind": "resize", "size": 1})
    assert tiny.factors(np.array([[7, 9], [3, 3], [1, 1], [8, 8]])).tolist() == [4, 2, 1, 8]


@pytest.mark.parametrize("augmentation", EXAMPLES, ids=lambda one: one.kind)
def test_what_may_come_before_the_resize_draws_and_does_the_same_in_any_resolution(augmentation: Any) -> None:
    keys = [ViewKey(0, index) for index in range(64)]
    plans = [augmentation.plan(Draws.of(0, keys), 0, np.full((64, 2), side)) for side in (64, 128)]
    if augmentation.scale_free:
        assert np.array_equal(plans[0][0], plans[1][0])
        assert all((sizes == side).all() for (_, sizes), side in zip(plans, (64, 128), strict=True))
        small = torch.stack(textured(64, 64, 64))
        large = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
        results = augmentation.apply(small, plans[0][0]), augmentation.apply(large, plans[1][0])
        assert torch.equal(results[0].repeat_interleave(2, 2).repeat_interleave(2, 3), results[1])


@pytest.mark.parametrize("augmentation", EXAMPLES, ids=lambda one: one.kind)
def test_only_a_resize_and_what_is_free_of_scale_may_come_first(augmentation: Any) -> None:
    entries = [augmentation.model_dump(mode="json"), CROP]
    if augmentation.scale_free or augmentation.kind in ("resize", "random_resized_crop"):
        assert spec(*entries).decode == "scaled"
    else:
        with pytest.raises(RecipeError, match="scaled needs a resize or a random_resized_crop"):
            spec(*entries)


SUBSAMPLINGS = {"444": 0, "422": 1, "420": 2}


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
@pytest.mark.parametrize("progressive", [False, True])
def test_pixels_are_those_of_another_decoder(factor: int, subsampling: str, progressive: bool, tmp_path: Path) -> None:
    simplejpeg = pytest.importorskip("simplejpeg")
    views = spec({"kind": "resize", "size": 12})
    for number, (height, width) in enumerate([(12 * factor, 13 * factor), (13 * factor - 1, 19 * factor + 1)]):
        image = picture(height, width)
        data = saved(image, subsampling=SUBSAMPLINGS[subsampling], progressive=progressive)
        written(tmp_path / "in", f"{number}.jpg", data)
        written(tmp_path / "grey", f"{number}.jpg", saved(image.convert("L")))
    for folder, mode, space in (("in", "RGB", "RGB"), ("grey", "L", "GRAY")):
        images = Views(ImageFolder(root=str(tmp_path / folder), mode=mode).open(), views).images
        for number in range(2):
            data = (tmp_path / folder / f"{number}.jpg").read_bytes()
            height, width = (
                -(-Image.open(io.BytesIO(data)).height // factor),
                -(-Image.open(io.BytesIO(data)).width // factor),
            )
            other = simplejpeg.decode_jpeg(data, space, min_height=height, min_width=width)
            assert other.shape[:2] == (height, width)
            assert np.array_equal(images.read(number).permute(1, 2, 0).numpy(), other)


def test_an_eighth_is_the_mean_of_each_block(tmp_path: Path) -> None:
    written(tmp_path / "in", "a.jpg", saved(picture(160, 240, "L"), quality=100))
    full = ImageFolder(root=str(tmp_path / "in"), mode="L").open()
    reduced = Views(full, spec({"kind": "resize", "size": 20})).images.read(0).double()
    means = full.read(0).double().view(1, 20, 8, 30, 8).mean((2, 4))
    assert (reduced - means).abs().max() <= 1


FILES = {
    "a.jpg": saved(picture(70, 101)),
    "b.jpg": saved(picture(101, 70, "L")),
    "c.jpg": saved(picture(64, 64, "CMYK")),
    "d.jpg": saved(picture(90, 70), "MPO", save_all=True, append_images=[picture(90, 70)]),
    "e.jpg": saved(picture(90, 70), progressive=True),
    "f.jpg": lossless(np.asarray(picture(70, 80, "L"))),
    "g.png": saved(picture(90, 71), "PNG"),
    "h.webp": saved(picture(90, 72), "WEBP"),
    "i.tif": saved(picture(90, 73), "TIFF", compression="jpeg"),
    "j.png": saved(picture(80, 70)),  # JPEG under another name
    "k.jpg": saved(picture(9, 12)),
}
EXIF = Image.Exif()
EXIF[0x0112] = 6
FILES["l.jpg"] = saved(picture(64, 128), exif=EXIF)
FACTORS = {"a.jpg": 4, "b.jpg": 4, "c.jpg": 4, "d.jpg": 4, "e.jpg": 4, "j.png": 4, "l.jpg": 4}
"""Of files whose shorter side is 64 or more for a result of 16; of others 1."""


def opened(folder: Path, kind: str, **fields: Any) -> Any:
    adapter: TypeAdapter[Dataset] = TypeAdapter(Dataset)
    if kind == "webdataset":
        written(folder, "a.tar", tarred(sorted(FILES.items())))
        return open_dataset(adapter.validate_python({"kind": kind, "shards": str(folder / "a.tar"), **fields}))
    for name, data in FILES.items():
        written(folder / "in", name, data)
    return open_dataset(adapter.validate_python({"kind": "image_folder", "root": str(folder / "in"), **fields}))


SIXTEEN = spec({"kind": "resize", "size": 16})


@pytest.mark.parametrize("orientation", ["ignore", "apply"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpeg_of_every_kind_is_reduced_and_other_files_are_decoded_in_full(
    mode: str, orientation: str, tmp_path: Path
) -> None:
    dataset = opened(tmp_path, "image_folder", mode=mode, orientation=orientation)
    images, full = Views(dataset, SIXTEEN).images, dataset.sizes()
    assert sorted(FILES) == list(images.ids)
    for index, name in enumerate(images.ids):
        factor, found = FACTORS.get(name, 1), images.read(index)
        assert tuple(found.shape[1:]) == tuple(images.sizes()[index]) == tuple(-(-full[index] // factor))
        if factor == 1:
            assert torch.equal(found, dataset.read(index))
        else:
            # The same picture: block means of all of it, but for the last row and column, are near.
            height, width = (side // factor for side in full[index])
            blocks = dataset.read(index)[:, : height * factor, : width * factor].double()
            means = blocks.reshape(len(found), height, factor, width, factor).mean((2, 4))
            assert (found[:, :height, :width] - means).abs().mean() < 3
    assert fingerprint(images) != fingerprint(dataset)
    assert fingerprint(Views(dataset, SIXTEEN).dataset) == fingerprint(dataset)


def test_every_kind_of_data_set_reduces_alike(tmp_path: Path) -> None:
    local = Views(opened(tmp_path, "image_folder"), SIXTEEN).images
    every = range(len(FILES))
    expected = read_images(local, every)
    with bucket() as s3:
        for name, data in FILES.items():
            s3.put(f"in/{name}", data)
        remote = ImageFolder(root=f"{s3.url}/in").open()
        for dataset in (remote, opened(tmp_path, "webdataset")):
            images = Views(dataset, SIXTEEN).images
            assert np.array_equal(images.sizes(), local.sizes())
            assert all(map(torch.equal, read_images(images, every), expected))
        asked = len(s3.front.asked("GET"))
        remote.digests()
        assert len(s3.front.asked("GET")) == asked  # one scan serves both


def test_rows_of_hugging_face_reduce_alike(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    local = Views(opened(tmp_path, "image_folder"), SIXTEEN).images
    rows = [{"bytes": data, "path": None} for _, data in sorted(FILES.items())]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": rows}, features=features).save_to_disk(str(tmp_path / "rows"))
    adapter: TypeAdapter[Dataset] = TypeAdapter(Dataset)
    found = open_dataset(adapter.validate_python({"kind": "huggingface", "path": str(tmp_path / "rows")}))
    images = Views(found, SIXTEEN).images
    assert np.array_equal(local.sizes(), images.sizes())
    assert all(torch.equal(local.read(index), images.read(index)) for index in range(len(FILES)))


def test_views_are_functions_of_their_keys_and_of_the_reduced_image(tmp_path: Path) -> None:
    views = Views(opened(tmp_path, "image_folder"), spec({"kind": "horizontal_flip"}, CROP))
    keys = [ViewKey(view, index) for view in range(4) for index in range(len(FILES))]
    together = views.__getitems__(keys)
    assert all(torch.equal(views[key], one) for key, one in zip(keys, together, strict=True))
    reduced = Views(Images([views.images.read(index) for index in range(len(FILES))]), spec(CROP, decode="full"))
    assert torch.equal(Views(views.dataset, spec(CROP)).__getitems__(keys), reduced.__getitems__(keys))


def test_canaries_tell_a_reduced_image_from_a_full_one(tmp_path: Path) -> None:
    dataset = opened(tmp_path, "image_folder")
    scaled, full = (Views(dataset, spec(CROP, decode=decode)) for decode in ("scaled", "full"))
    keys = canaries.choose(0, len(FILES), 4)
    recorded, pixels = canaries.take(scaled, keys)
    assert canaries.compare(scaled, recorded, pixels).equal
    other = canaries.compare(full, recorded, pixels)
    whole = (scaled.images.sizes() == dataset.sizes()).all(axis=1)
    assert other.raw_equal == sum(whole[key.index] for key in keys)
    assert whole.sum() == 6 < len(FILES)


def test_specs_without_it_are_stored_as_before() -> None:
    plain = load_recipe({"augmentations": [CROP]}, ViewSpec)
    assert "decode" not in plain.model_dump(mode="json")
    assert plain.digest() == load_recipe({"augmentations": [CROP], "decode": "full"}, ViewSpec).digest()
    assert spec(CROP).model_dump(mode="json")["decode"] == "scaled"
    assert spec(CROP).digest() != plain.digest()


@pytest.mark.parametrize(
    "augmentations",
    [[], [{"kind": "horizontal_flip"}], [{"kind": "random_crop", "size": 4}, CROP], [{"kind": "rand_augment"}, CROP]],
)
def test_what_counts_the_pixels_of_the_file_is_refused(augmentations: list[dict[str, Any]]) -> None:
    for recipe, model in (({}, ViewSpec), ({"out": "run", "epochs": 1}, TeacherRecipe)):
        entries = {**recipe, "decode": "scaled", "augmentations": augmentations}
        with pytest.raises(RecipeError, match=r"decode.*scaled needs a resize.*leave decode out"):
            load_recipe(entries, model)  # type: ignore[type-var]


def test_images_that_are_no_files_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"not decoded from files.*Fix: decode: full, or name the files"):
        Views(load_recipe({"num_images": 10}, Bundled).open(), SIXTEEN)
