"""Resizing: the exact kernel is its definition in float64, within a level of torchvision, and the same everywhere."""

import hashlib
import math

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from logitcache.views.augmentations import RandomResizedCrop, Resize
from logitcache.views.augmentations.resize import resample, taps
from tests.views.images import textured
from tests.views.planning import image_of, plan_one

FILTERS = ("bilinear", "bicubic")
# Height and width, of the image and of the result: up, down, both, from and to one pixel; beyond the side up to which
# images are resampled as a batch, and within it.
SHAPES = [
    *[((32, 32), (32, 32)), ((20, 31), (32, 40)), ((64, 60), (17, 9)), ((1, 1), (8, 5)), ((5, 3), (64, 1))],
    *[((150, 201), (96, 96)), ((97, 61), (130, 200)), ((300, 41), (3, 65)), ((8, 500), (70, 33)), ((65, 1), (9, 9))],
]
# sha256 of the pixels of `golden_digest`: they are the same on every machine. A change needs a new plan version.
GOLDEN = {
    "bilinear": "ea23dbac74f449e7254b537dceb299570442aa1b4bbdeb52fe669373a05c5565",
    "bicubic": "2352a3fd573315a46d3f09c7ac10ce08112d9dfb053e0366155c379a91fec967",
}


def whole(images: torch.Tensor) -> np.ndarray:
    """Boxes that hold each image [B, C, H, W]."""
    return np.tile([0, 0, *images.shape[2:]], (len(images), 1))


def numbers(height: int, width: int) -> torch.Tensor:
    """An image from integers alone, with slopes, edges and grain: uint8 [3, H, W]."""
    channel, row, column = np.meshgrid(np.arange(3), np.arange(height), np.arange(width), indexing="ij")
    grain = (row * 7919 + column * 104729 + channel * 31) * 2654435761 % 2**32 >> 27
    return torch.from_numpy(((row * 5 + column * 3 * (channel + 1) + grain) % 256).astype(np.uint8))


def golden_digest(interpolation: str) -> str:
    state = hashlib.sha256()
    for shape, size in SHAPES:
        images = numbers(*shape)[None]
        state.update(resample(images, whole(images), size, interpolation).numpy().tobytes())
    return state.hexdigest()


def weight(interpolation: str, distance: float) -> float:
    x = abs(distance)
    if interpolation == "bilinear":
        return max(0.0, 1.0 - x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def defined_matrix(length: int, out: int, interpolation: str) -> np.ndarray:
    """The definition, one weight at a time, not quantised: [out, length]."""
    scale = length / out
    widened = max(1.0, scale)
    rows = []
    for place in range(out):
        centre = (place + 0.5) * scale
        row = [weight(interpolation, (other + 0.5 - centre) / widened) for other in range(length)]
        rows.append([value / math.fsum(row) for value in row])
    return np.array(rows)


def defined(image: np.ndarray, size: tuple[int, int], interpolation: str) -> tuple[np.ndarray, bool]:
    """Resize [C, H, W] by the definition; says too whether a sum was too near to a half to tell how it is rounded."""
    doubtful = False
    for axis in (2, 1):
        matrix = defined_matrix(image.shape[axis], size[axis - 1], interpolation)
        sums = np.moveaxis(np.tensordot(image.astype(np.float64), matrix, axes=(axis, 1)), -1, axis)
        doubtful |= bool((np.abs(sums % 1 - 0.5) < 2e-3).any())
        image = np.clip(np.floor(sums + 0.5), 0, 255).astype(np.uint8)
    return image, doubtful


def difference(one: torch.Tensor, other: torch.Tensor) -> int:
    assert one.shape == other.shape
    return int((one.int() - other.int()).abs().max())


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize(("shape", "size"), SHAPES)
def test_exact_is_its_definition_and_within_a_level_of_torchvision(shape, size, interpolation):
    images = torch.stack(textured(2, *shape, seed=3))
    ours = resample(images, whole(images), size, interpolation)
    assert ours.dtype == torch.uint8
    theirs = F.resize_image(images, list(size), InterpolationMode(interpolation), antialias=True)
    assert difference(ours, theirs) <= 1
    for image, found in zip(images, ours, strict=True):
        expected, doubtful = defined(image.numpy(), size, interpolation)
        assert difference(found, torch.from_numpy(expected)) <= doubtful


@pytest.mark.parametrize("interpolation", FILTERS)
def test_exact_is_what_pillow_computes_along_the_rows_and_then_the_columns(interpolation):
    """To the bit; one axis at a time, as releases of Pillow differ in which they take first."""
    method = Image.Resampling[interpolation.upper()]
    for shape, size in [((32, 32), (24, 40)), ((150, 201), (96, 96)), ((97, 61), (130, 200)), ((300, 41), (3, 65))]:
        [image] = textured(1, *shape, seed=9)
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        theirs = picture.resize((size[1], shape[0]), method).resize((size[1], size[0]), method)
        ours = resample(image[None], whole(image[None]), size, interpolation)[0]
        assert torch.equal(ours, torch.from_numpy(np.array(theirs)).permute(2, 0, 1))


@pytest.mark.parametrize("interpolation", FILTERS)
def test_exact_keeps_its_pixels(interpolation):
    assert golden_digest(interpolation) == GOLDEN[interpolation]


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize(("side", "size"), [(32, (32, 32)), (40, (25, 64)), (90, (70, 80))])
def test_exact_crops_do_not_depend_on_batch_order_threads_or_memory(side, size, interpolation):
    images = torch.stack(textured(7, side, side + 3))
    crop = RandomResizedCrop(size=size, interpolation=interpolation, kernel="exact")
    params, _ = plan_one(crop, [(side, side + 3)] * 7)
    together = crop.apply(images, params)
    for row, (top, left, height, width) in enumerate(params.tolist()):
        assert torch.equal(crop.apply(images[row : row + 1], params[row : row + 1])[0], together[row])
        cut = images[row : row + 1, :, top : top + height, left : left + width]
        assert torch.equal(resample(cut, whole(cut), size, interpolation)[0], together[row])
    assert torch.equal(crop.apply(images.flip(0), params[::-1].copy()).flip(0), together)
    channels_last = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert torch.equal(crop.apply(channels_last, params), together)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(crop.apply(images, params), together)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("side", "size"), [(32, 24), (90, 80)])
def test_exact_reads_no_setting_of_torchs_precision(side, size):
    images = torch.stack(textured(4, side, side))
    expected = resample(images, whole(images), (size, size), "bicubic")
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(resample(images, whole(images), (size, size), "bicubic"), expected)
    finally:
        torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize("interpolation", FILTERS)
def test_weights_are_exact_and_leave_a_flat_image_as_it_is(interpolation):
    for length, out in [(1, 1), (7, 3), (3, 7), (224, 32), (301, 100), (900, 7)]:
        starts, weights = taps(length, out, interpolation)
        assert (weights * 2**22 == np.rint(weights * 2**22)).all()
        assert np.abs(weights).sum(axis=1).max() < 2
        assert starts.min() >= 0
        assert starts.max() + weights.shape[1] <= length
        assert (np.diff(starts) >= 0).all()
        matrix = np.zeros((out, length))
        np.put_along_axis(matrix, starts[:, None] + np.arange(weights.shape[1]), weights, axis=1)
        assert np.abs(matrix - defined_matrix(length, out, interpolation)).max() < 2**-22
    for value in (0, 1, 128, 255):
        flat = torch.full((1, 3, 83, 70), value, dtype=torch.uint8)
        assert (resample(flat, whole(flat), (31, 99), interpolation) == value).all()


@pytest.mark.parametrize("kernel", ["torchvision", "exact"])
@pytest.mark.parametrize("size", [24, (20, 30)])
def test_resize_of_a_batch_is_that_of_each_image(kernel, size):
    images = torch.stack([image_of(33, 47, seed=seed) for seed in range(3)])
    resize = Resize(size=size, kernel=kernel)
    params, sizes = plan_one(resize, [(33, 47)] * 3)
    found = resize.apply(images, params)
    assert tuple(found.shape[2:]) == tuple(sizes[0].tolist())
    for row in range(3):
        assert torch.equal(resize.apply(images[row : row + 1], params[row : row + 1])[0], found[row])
        expected = F.resize(images[row], size if isinstance(size, int) else list(size), antialias=True)
        assert difference(found[row], expected) <= (kernel == "exact")


@pytest.mark.parametrize("component", [Resize, RandomResizedCrop])
def test_exact_is_refused_for_nearest_and_stored(component):
    assert component(size=8, kernel="exact").model_dump()["kernel"] == "exact"
    assert component(size=8).kernel == "torchvision"
    for fields in ({"kernel": "exact", "interpolation": "nearest"}, {"interpolation": "nearest", "kernel": "exact"}):
        with pytest.raises(ValidationError, match="exact is for bilinear and bicubic"):
            component(size=8, **fields)
    with pytest.raises(ValidationError, match="kernel"):
        component(size=8, kernel="pillow")
