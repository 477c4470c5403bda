"""Augmentations mean what torchvision's transforms of the same name mean: equal pixels, equal distributions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from logitcache.views.augmentations import CenterCrop, HorizontalFlip, RandomCrop, RandomResizedCrop, Resize
from tests.views.distributions import drawn, same_distribution
from tests.views.planning import image_of, plan_one


@settings(max_examples=60)
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    # torch itself cannot resize three channels to 1 × 1
    size=st.integers(2, 60) | st.tuples(st.integers(2, 60), st.integers(1, 60)),
    interpolation=st.sampled_from(["nearest", "bilinear", "bicubic"]),
)
def test_resize_gives_the_pixels_of_torchvision(height, width, size, interpolation):
    image = image_of(height, width)
    [params], _ = plan_one(Resize(size=size), [(height, width)])
    expected = F.resize(
        image, [size] if isinstance(size, int) else list(size), InterpolationMode(interpolation), antialias=True
    )
    found = Resize(size=size, interpolation=interpolation).apply(image[None], params[None])[0]
    assert torch.equal(found, expected)


@settings(max_examples=60)
@given(height=st.integers(1, 60), width=st.integers(1, 60), size=st.tuples(*[st.integers(1, 60)] * 2))
def test_center_crop_gives_the_pixels_of_torchvision(height, width, size):
    image = image_of(height, width)
    assert torch.equal(
        CenterCrop(size=size).apply(image[None], np.empty((1, 0), np.int64))[0], F.center_crop(image, list(size))
    )


@pytest.mark.parametrize("mode", ["constant", "edge", "reflect", "symmetric"])
@pytest.mark.parametrize("fill", [0, 77, 255])
def test_random_crop_gives_the_pixels_of_torchvision(mode, fill):
    crop = RandomCrop(size=(20, 31), padding=6, padding_mode=mode, fill=fill)
    theirs = v2.RandomCrop((20, 31), padding=6, padding_mode=mode, fill=fill)
    params, _ = plan_one(crop, [(24, 29)] * 20)
    image = image_of(24, 29)
    for top, left in params.tolist():
        given_to_them = {"needs_crop": True, "top": top, "left": left, "height": 20, "width": 31}
        given_to_them |= {"needs_pad": True, "padding": [6, 6, 6, 6]}
        expected = theirs.transform(image, given_to_them)
        assert torch.equal(crop.apply(image[None], np.array([[top, left]]))[0], expected)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(20, 20), (61, 33)])
def test_random_resized_crop_gives_the_pixels_of_torchvision(interpolation, size):
    crop = RandomResizedCrop(size=size, interpolation=interpolation)
    theirs = v2.RandomResizedCrop(size, interpolation=InterpolationMode(interpolation), antialias=True)
    params, _ = plan_one(crop, [(40, 52)] * 20)
    image = image_of(40, 52)
    for row in params.tolist():
        box = dict(zip(("top", "left", "height", "width"), row, strict=True))
        assert torch.equal(crop.apply(image[None], np.array([row]))[0], theirs.transform(image, box))


def test_horizontal_flip_gives_the_pixels_of_torchvision():
    image = image_of(5, 8)
    assert torch.equal(HorizontalFlip().apply(image[None], np.array([[1]]))[0], F.horizontal_flip(image))
    assert torch.equal(HorizontalFlip().apply(image[None], np.array([[0]]))[0], image)


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((32, 32), {}),
        ((375, 500), {}),
        ((600, 47), {}),
        ((200, 300), {"scale": (0.3, 0.5), "ratio": (0.3, 3.0)}),
        ((90, 100), {"scale": (0.95, 1.0), "ratio": (0.99, 1.01)}),
        # Most tries do not fit, so that the central crop is often taken.
        ((20, 400), {"scale": (0.4, 1.0)}),
        ((400, 20), {"scale": (0.4, 1.0)}),
        ((7, 7), {"scale": (0.8, 1.0), "ratio": (1.5, 2.0)}),
        ((1, 3), {}),
    ],
)
def test_random_resized_crops_are_distributed_as_those_of_torchvision(size, options):
    count = 2500
    theirs = v2.RandomResizedCrop(8, **options)
    expected = drawn(theirs.make_params, size, ["top", "left", "height", "width"], count)
    found, _ = plan_one(RandomResizedCrop(size=8, **options), [size] * count, seed=3)
    same_distribution(found, expected)


@pytest.mark.parametrize(
    ("size", "padding", "crop"), [((32, 32), 4, (32, 32)), ((40, 33), 0, (8, 33)), ((5, 90), 2, (9, 9))]
)
def test_random_crops_are_distributed_as_those_of_torchvision(size, padding, crop):
    count = 2500
    theirs = v2.RandomCrop(crop, padding=padding or None)
    expected = drawn(theirs.make_params, size, ["top", "left"], count)
    found, _ = plan_one(RandomCrop(size=crop, padding=padding), [size] * count)
    same_distribution(found, expected)
    for column, room in enumerate(np.array(size) + 2 * padding - crop + 1):
        counts = np.bincount(found[:, column], minlength=room)
        assert len(counts) == room
        assert room == 1 or stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_images_are_flipped_as_often_as_by_torchvision(p):
    count = 4000
    theirs = v2.RandomHorizontalFlip(p)
    image = torch.tensor([[[0, 1]]], dtype=torch.uint8)
    expected = sum(int(theirs(image)[0, 0, 0]) for _ in range(count))
    params, _ = plan_one(HorizontalFlip(p=p), [(4, 4)] * count)
    found = int(params.sum())
    assert set(params.ravel().tolist()) <= {0, 1}
    if p in (0.0, 1.0):
        assert found == expected == p * count
    else:
        table = [[found, count - found], [expected, count - expected]]
        assert stats.chi2_contingency(table).pvalue > 1e-4
