"""Paired images: one geometry for two sets of images, each at its size; colours are each side's own."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from logitcache.errors import DataError, RecipeError
from logitcache.views.augmentations import ColorJitter, RandomErasing
from logitcache.views.augmentations.base import Scale, rescaled_boxes
from logitcache.views.keys import ViewKey
from logitcache.views.loader import ViewLoader
from logitcache.views.paired import UNPAIRED, Frame, paired_images
from logitcache.views.spec import Views, ViewSpec
from tests.views.images import Images, textured

Sizes = Sequence[tuple[int, int]]
SIZES: Sizes = [(40, 61), (57, 44), (64, 64), (48, 48), (41, 60), (64, 64)]
NUM_IMAGES = len(SIZES)
KEYS = [ViewKey(view, index) for view in range(4) for index in range(NUM_IMAGES)]
LABELS = np.arange(NUM_IMAGES) % 3
COLORS = [
    {"kind": "color_jitter", "brightness": 0.4, "hue": 0.1},
    {"kind": "random_grayscale", "p": 0.5},
    {"kind": "gaussian_blur", "kernel_size": 3},
]
RESIZED = {"kind": "resize", "size": [48, 48]}
MOVING: dict[str, list[dict[str, Any]]] = {
    "resized_crop": [{"kind": "random_resized_crop", "size": 32}, {"kind": "horizontal_flip"}],
    "exact": [{"kind": "random_resized_crop", "size": [32, 24], "kernel": "exact"}],
    "resize_centre": [{"kind": "resize", "size": 40}, {"kind": "center_crop", "size": 32}],
    "centre": [{"kind": "center_crop", "size": 52}],
    "crop": [RESIZED, {"kind": "random_crop", "size": 40}],
    "padded": [RESIZED, {"kind": "random_crop", "size": 48, "padding": 6, "padding_mode": "edge"}],
    "two_crops": [{"kind": "random_resized_crop", "size": 40}, {"kind": "random_crop", "size": 32}],
}
ANY = MOVING | {
    "black": [RESIZED, {"kind": "random_crop", "size": 48, "padding": 6}],
    "reflected": [RESIZED, {"kind": "random_crop", "size": 48, "padding": 6, "padding_mode": "reflect"}],
    "symmetric": [RESIZED, {"kind": "random_crop", "size": 48, "padding": 6, "padding_mode": "symmetric"}],
    "erased": [RESIZED, {"kind": "random_erasing", "p": 1.0}],
    "noise": [RESIZED, {"kind": "random_erasing", "p": 1.0, "value": "noise"}],
}
MIXING = [{"kind": "cutmix", "p": 0.5}, {"kind": "mixup", "p": 0.4}]
every_geometry = pytest.mark.parametrize("augmentations", ANY.values(), ids=ANY)
every_move = pytest.mark.parametrize("augmentations", MOVING.values(), ids=MOVING)


def spec_of(augmentations: list[dict[str, Any]], **more: Any) -> ViewSpec:
    return ViewSpec.model_validate_json(json.dumps({"num_views": 4, "seed": 5, "augmentations": augmentations} | more))


def scenes(sizes: Sizes) -> Images:
    """Images whose pixels state their place in the picture: height and width in two channels, the image in a third."""
    pixels = []
    for number, (height, width) in enumerate(sizes):
        rows, columns = torch.meshgrid(
            (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij"
        )
        marks = torch.full((height, width), 40.0 * number)
        pixels.append(torch.stack([255 * rows, 255 * columns, marks]).round().to(torch.uint8))
    return Images(pixels)


def photographs(sizes: Sizes, channels: int = 3) -> Images:
    return Images([textured(1, *size, channels, seed)[0] for seed, size in enumerate(sizes)])


def paired(
    spec: ViewSpec,
    teacher: Images,
    student: Images,
    seen: tuple[int, int],
    shown: tuple[int, int],
    colors: tuple[Any, ...] = (),
) -> Views:
    frame = Frame(spec, teacher.sizes(), Scale(seen, shown), len(student.pixels[0]), colors)
    images = paired_images(student, np.arange(len(teacher.pixels)), len(teacher.pixels), LABELS, 3, None)
    return Views(images, spec, frame=frame)


def beside(spec: ViewSpec, teacher: Images, student: Images, factor: float) -> tuple[Tensor, Tensor]:
    """Render the teacher's views and those of paired images, `factor` times their size."""
    own = Views(teacher, spec).__getitems__(KEYS)
    height, width = own.shape[2:]
    shown = (round(height * factor), round(width * factor))
    return own, paired(spec, teacher, student, (height, width), shown).__getitems__(KEYS)


@every_geometry
@pytest.mark.parametrize("mixing", [[], MIXING], ids=["alone", "mixed"])
def test_the_same_images_at_the_same_size_are_the_views_that_the_teacher_saw(augmentations: Any, mixing: Any) -> None:
    teacher = photographs(SIZES)
    own, other = beside(spec_of(augmentations, mixing=mixing), teacher, teacher, 1)
    assert torch.equal(own, other)


@every_move
@pytest.mark.parametrize("factor", [0.5, 1, 1.5])
def test_images_of_any_other_sizes_show_the_same_places(augmentations: Any, factor: float) -> None:
    """Each image is stretched in its own way; a place is compared in units of the picture, not by our arithmetic."""
    others = [
        (round(height * (0.6 + 0.2 * n)), round(width * (1.7 - 0.2 * n))) for n, (height, width) in enumerate(SIZES)
    ]
    own, other = beside(spec_of(augmentations), scenes(SIZES), scenes(others), factor)
    assert other.shape[2:] == tuple(round(side * factor) for side in own.shape[2:])
    scaled = torch.nn.functional.interpolate(own.float(), other.shape[2:], mode="area" if factor < 1 else "bilinear")
    inside = (slice(None), slice(None), slice(3, -3), slice(3, -3))  # a border is padded, or is one pixel off
    differences = (scaled - other).abs()[inside]
    if any(one["kind"] == "center_crop" and one["size"] == 52 for one in augmentations):
        differences = differences[(own.amin(dim=(1, 2, 3)) > 0)]  # without those whose padding ends within
    # A pixel of the smallest image is 255 / 24 levels wide, and each step may round to half of one.
    assert differences.max() <= 16
    assert differences.mean() <= 4


def test_half_the_size_is_shifted_and_cut_without_resampling() -> None:
    spec = spec_of([{"kind": "random_crop", "size": 28, "padding": 2, "fill": 9}, {"kind": "horizontal_flip"}])
    whole = Images(textured(NUM_IMAGES, 28, 28, 1))
    half = Images([image[:, ::2, ::2].clone() for image in whole.pixels])
    own, other = beside(spec, whole, half, 0.5)
    plans, _ = spec.plan(KEYS, whole.sizes()[[key.index for key in KEYS]])
    for row, (key, (top, left), (flipped,)) in enumerate(zip(KEYS, *(plan.tolist() for plan in plans), strict=True)):
        padded = torch.nn.functional.pad(half.pixels[key.index], (1, 1, 1, 1), value=9)
        # From -2 … 2 pixels to -1 … 1, halves upwards.
        y, x = ((place - 2 + 1) // 2 + 1 for place in (top, left))
        window = padded[:, y : y + 14, x : x + 14]
        assert torch.equal(other[row], window.flip(-1) if flipped else window)
    assert own.shape[2:] == (28, 28)


def test_an_erased_rectangle_and_the_box_of_a_mixture_are_at_the_same_place() -> None:
    black = [Images([torch.zeros((1, side, side), dtype=torch.uint8)] * NUM_IMAGES) for side in (64, 32)]
    spec = spec_of([{"kind": "random_erasing", "p": 1.0, "value": 255, "scale": [0.1, 0.3]}])
    own, other = beside(spec, *black, 0.5)
    halved = torch.nn.functional.avg_pool2d(own.float(), 2)
    # Edges lie on half pixels: of these half, at a corner three quarters, may be on the other side.
    assert ((halved - other).abs() > 0.75 * 255 + 1).sum() == 0
    assert ((halved - other).abs() > 0.5 * 255 + 1).sum() <= 4 * len(KEYS)
    assert (other == 255).any(dim=(1, 2, 3)).all()
    numbered = [
        Images([torch.full((1, side, side), 40 * n, dtype=torch.uint8) for n in range(NUM_IMAGES)]) for side in (64, 32)
    ]
    mixed = spec_of([], mixing=[{"kind": "cutmix"}])
    own, other = beside(mixed, *numbered, 0.5)
    halved = torch.nn.functional.avg_pool2d(own.float(), 2)
    assert ((halved - other).abs() <= 0.75 * 200).all()
    assert ((halved - other).abs() > 0).float().mean() < 0.06  # the edges of boxes
    views = Views(numbered[0], mixed), paired(mixed, *numbered, (64, 64), (32, 32))
    shares = [one.mixture(KEYS, images.shape[2:]) for one, images in zip(views, (own, other), strict=True)]
    assert shares[0] is not None
    assert shares[1] is not None
    assert np.array_equal(shares[0].share, shares[1].share)  # the labels weigh as the teacher's views did


@pytest.mark.parametrize("kind", ["rand_augment", "trivial_augment_wide"])
@pytest.mark.parametrize("factor", [0.5, 1])
def test_of_a_policy_paired_images_take_what_moves_pixels(kind: str, factor: float) -> None:
    """A light square on black: it lies where the teacher's lies, and is as light as before."""
    squares = []
    for side in (64, 32):
        image = torch.zeros((1, side, side), dtype=torch.uint8)
        image[:, side // 4 : side // 2, side // 4 : side // 2] = 200
        squares.append(Images([image] * NUM_IMAGES))
    teacher, student = squares[0], squares[0 if factor == 1 else 1]
    own, other = beside(spec_of([{"kind": kind}]), teacher, student, factor)
    assert set(other.unique().tolist()) <= {0, 200}
    moved = (other != student.pixels[0]).any(dim=(1, 2, 3))
    assert 0 < int(moved.sum()) < len(KEYS)
    # Where the teacher's square is still light on dark, its centre is that of the paired one.
    for one, two in zip(own.float(), other.float(), strict=True):
        light = (one > 100).float()
        if 0.02 < light.mean() < 0.2 and two.sum() > 0:
            assert (centre(light) / 64 - centre(two) / len(two[0])).abs().max() <= 0.03


def centre(image: Tensor) -> Tensor:
    """Return the mean height and width of what is light."""
    height, width = image.shape[1:]
    rows, columns = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return torch.stack([(image[0] * rows).sum(), (image[0] * columns).sum()]) / image[0].sum()


def test_colours_are_each_sides_own() -> None:
    teacher, crop = photographs(SIZES), {"kind": "random_resized_crop", "size": 32}
    colorful, plain = spec_of([crop, *COLORS]), spec_of([crop])
    own = Views(teacher, plain).__getitems__(KEYS)
    assert not torch.equal(Views(teacher, colorful).__getitems__(KEYS), own)
    assert torch.equal(paired(colorful, teacher, teacher, (32, 32), (32, 32)).__getitems__(KEYS), own)
    # A change of their own is drawn from the same keys: of the teacher's entries it is the teacher's change.
    entries = colorful.augmentations[1:]
    assert torch.equal(
        paired(plain, teacher, teacher, (32, 32), (32, 32), entries).__getitems__(KEYS),
        Views(teacher, colorful).__getitems__(KEYS),
    )
    stronger = spec_of([crop, {"kind": "color_jitter", "brightness": 0.9}])
    assert torch.equal(
        paired(colorful, teacher, teacher, (32, 32), (32, 32), (ColorJitter(brightness=0.9),)).__getitems__(KEYS),
        Views(teacher, stronger).__getitems__(KEYS),
    )


def test_a_level_for_each_channel_becomes_one_for_images_of_other_channels() -> None:
    erasing = {"kind": "random_erasing", "p": 1.0, "value": [30, 60, 90]}
    policy = {"kind": "rand_augment", "fill": [30, 60, 90]}
    grey = Images([torch.zeros((1, 32, 32), dtype=torch.uint8)] * NUM_IMAGES)
    teacher = photographs([(32, 32)] * NUM_IMAGES)
    found = paired(spec_of([erasing]), teacher, grey, (32, 32), (32, 32)).__getitems__(KEYS)
    assert set(found.unique().tolist()) == {0, 60}
    found = paired(spec_of([policy]), teacher, grey, (32, 32), (32, 32)).__getitems__(KEYS)
    assert set(found.unique().tolist()) == {0, 60}
    assert RandomErasing(value=(30, 60, 90)).beside(Scale((1, 1), (1, 1)), 3).value == (30, 60, 90)


@pytest.mark.parametrize(
    "augmentation",
    [
        {"kind": "torchvision", "name": "ElasticTransform"},
        {"kind": "custom", "factory": "tests.views.test_paired:spec_of"},
    ],
    ids=lambda entry: entry["kind"],
)
def test_a_transform_of_others_is_refused(augmentation: Any) -> None:
    images = photographs([(32, 32)] * NUM_IMAGES)
    with pytest.raises(RecipeError, match=r"only its code knows what it draws\. Fix: "):
        paired(spec_of([augmentation]), images, images, (32, 32), (32, 32)).__getitems__(KEYS)


def test_translations_by_pixels_are_refused_for_larger_views() -> None:
    images = photographs([(32, 32)] * NUM_IMAGES)
    with pytest.raises(RecipeError, match=r"up to 32 pixels .* Fix: --size '\[32, 32\]'"):
        paired(spec_of([{"kind": "trivial_augment_wide"}]), images, images, (32, 32), (64, 64)).__getitems__(KEYS)


def test_an_image_without_a_pair_is_never_another() -> None:
    images = photographs([(32, 32)] * NUM_IMAGES)
    found = paired_images(images, np.array([2, UNPAIRED, 0]), 3, LABELS[:3], 3, None)
    assert found.ids[:] == ["image 2", "", "image 0"]
    assert torch.equal(found.read(0), images.pixels[2])
    with pytest.raises(DataError, match="image 1 of the cache has no paired image"):
        found.read_batch([0, 1])


@pytest.mark.parametrize("augmentations", [ANY["two_crops"], ANY["noise"]], ids=["crops", "noise"])
def test_a_view_depends_on_its_key_alone(augmentations: Any) -> None:
    """Alone, together, in another order, by workers: resizes by the shorter side are grouped by the teacher's sizes."""
    spec = spec_of(
        [{"kind": "resize", "size": 48}, {"kind": "center_crop", "size": 44}, *augmentations[1:]], mixing=MIXING
    )
    teacher = photographs(SIZES)
    size = tuple(Views(teacher, spec)[KEYS[0]].shape[1:])
    views = paired(spec, teacher, photographs([(30, 30)] * NUM_IMAGES), size, size)
    together = views.__getitems__(KEYS)
    assert torch.equal(views.__getitems__(KEYS[::-1]).flip(0), together)
    assert all(torch.equal(views[KEYS[row]], together[row]) for row in range(0, len(KEYS), 5))


def test_workers_render_the_same() -> None:
    teacher = photographs(SIZES)
    views = paired(spec_of(ANY["resized_crop"]), teacher, photographs([(30, 40)] * NUM_IMAGES), (32, 32), (24, 24))
    loader = ViewLoader(views, 1, "fork")
    (found,) = loader.render([KEYS])
    loader.close()
    assert torch.equal(found, views.__getitems__(KEYS))


@settings(max_examples=50)
@given(
    box=st.tuples(*[st.integers(0, 40)] * 2, *[st.integers(0, 40)] * 2),
    after=st.tuples(*[st.integers(1, 200)] * 2),
)
def test_a_box_stays_inside_and_keeps_a_pixel(box: tuple[int, ...], after: tuple[int, int]) -> None:
    before = np.array([[80, 80]])
    ((top, left, height, width),) = rescaled_boxes(np.array([box]), before, np.array([after])).tolist()
    assert 0 <= top <= top + height <= after[0]
    assert 0 <= left <= left + width <= after[1]
    assert (height > 0, width > 0) == (box[2] > 0, box[3] > 0)
    assert abs(top - box[0] * after[0] / 80) <= 1
    assert abs(top + height - (box[0] + box[2]) * after[0] / 80) <= 1
