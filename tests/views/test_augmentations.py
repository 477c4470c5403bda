"""Crops, flips and resizing: the parameters that are planned. test_augmentation_contract.py holds for all kinds."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from logitcache.errors import DataError
from logitcache.views.augmentations import (
    Augmentation,
    HorizontalFlip,
    RandomCrop,
    RandomResizedCrop,
    Resize,
)
from logitcache.views.augmentations.base import look_up
from logitcache.views.spec import ViewSpec
from tests.views.planning import image_of, keys_of, plan_one

ADAPTER: TypeAdapter[Augmentation] = TypeAdapter(Augmentation)
sides = st.integers(1, 600)
image_sizes = st.lists(st.tuples(sides, sides), min_size=1, max_size=12)
crop_sizes = st.integers(1, 700) | st.tuples(st.integers(1, 700), st.integers(1, 700))


@given(sizes=image_sizes, size=crop_sizes, seed=st.integers(0, 2**64 - 1), padding=st.integers(0, 700))
def test_random_crops_are_inside_the_padded_image(sizes, size, seed, padding):
    height, width = (size, size) if isinstance(size, int) else size
    crop = RandomCrop(size=size, padding=padding)
    room = np.array(sizes) + 2 * padding - (height, width)
    if room.min() < 0:
        with pytest.raises(DataError, match="does not fit"):
            plan_one(crop, sizes, seed)
        return
    corners, planned = plan_one(crop, sizes, seed)
    assert (corners >= 0).all()
    assert (corners <= room).all()
    assert planned.tolist() == [[height, width]] * len(sizes)


@given(
    sizes=image_sizes,
    seed=st.integers(0, 2**64 - 1),
    scale=st.tuples(*[st.floats(1e-6, 1.0)] * 2).map(sorted),
    ratio=st.tuples(*[st.floats(0.01, 100)] * 2).map(sorted),
)
def test_random_resized_crops_are_inside_the_image(sizes, seed, scale, ratio):
    crop = RandomResizedCrop(size=4, scale=tuple(scale), ratio=tuple(ratio))
    boxes, planned = plan_one(crop, sizes, seed)
    corners, extents = boxes[:, :2], boxes[:, 2:]
    assert (corners >= 0).all()
    assert (extents >= 1).all()
    assert (corners + extents <= np.array(sizes)).all()
    assert planned.tolist() == [[4, 4]] * len(sizes)


def test_every_side_up_to_600_can_be_cropped():
    sizes = [(side, other) for side in range(1, 601) for other in (1, side, 601 - side)]
    for crop in (RandomResizedCrop(size=4), RandomResizedCrop(size=4, scale=(0.9, 1.0), ratio=(3.0, 4.0))):
        boxes, _ = plan_one(crop, sizes)
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, 2:] >= 1).all()
        assert (boxes[:, :2] + boxes[:, 2:] <= np.array(sizes)).all()


@given(data=st.data(), sizes=image_sizes, seed=st.integers(0, 2**64 - 1), view=st.integers(0, 2**32 - 1))
def test_the_plan_of_a_batch_is_that_of_each_image_alone_in_any_order(data, sizes, seed, view):
    spec = ViewSpec(
        seed=seed,
        augmentations=(
            RandomResizedCrop(size=(9, 7)),
            HorizontalFlip(),
            RandomCrop(size=(9, 7), padding=3),
            HorizontalFlip(),
            Resize(size=5),
        ),
    )
    keys = keys_of(len(sizes), view)
    order = data.draw(st.permutations(range(len(sizes))))
    together, _ = spec.plan(keys, np.array(sizes))
    alone = [spec.plan([key], np.array([size]))[0] for key, size in zip(keys, sizes, strict=True)]
    permuted, _ = spec.plan([keys[row] for row in order], np.array(sizes)[order])
    for step, params in enumerate(together):
        assert params.dtype == np.int64
        assert np.array_equal(params, np.concatenate([one[step] for one in alone]))
        assert np.array_equal(params[order], permuted[step])


@pytest.mark.parametrize(
    ("mode", "size", "padding", "fits"),
    [
        ("reflect", (5, 9), 4, True),
        ("reflect", (4, 9), 4, False),
        ("reflect", (9, 1), 1, False),
        ("symmetric", (4, 9), 4, True),
        ("symmetric", (9, 3), 4, False),
        ("edge", (1, 1), 4, True),
        ("constant", (1, 1), 4, True),
    ],
)
def test_an_image_too_small_to_be_mirrored_is_refused_before_torch_does(mode, size, padding, fits):
    crop, sizes = RandomCrop(size=3, padding=padding, padding_mode=mode), [(20, 20), size]
    if fits:
        params, _ = plan_one(crop, sizes)
        assert crop.apply(image_of(*size)[None], params[1:])[0].shape == (3, 3, 3)
        return
    with pytest.raises(DataError, match=rf"image 1 of size \({size[0]}, {size[1]}\) by {padding} with {mode}"):
        plan_one(crop, sizes)


def test_a_crop_that_does_not_fit_names_the_image_and_the_fix():
    with pytest.raises(DataError, match=r"\(32, 32\) does not fit image 1 of size \(33, 31\) .* resize first"):
        plan_one(RandomCrop(size=32), [(32, 32), (33, 31)])


@pytest.mark.parametrize(
    ("size", "ratio", "box"),
    [
        ((10, 1000), (0.75, 4 / 3), [0, 493, 10, 13]),
        ((1000, 10), (0.75, 4 / 3), [493, 0, 13, 10]),
        ((1, 1000), (0.75, 4 / 3), [0, 499, 1, 1]),
        # The nearest box of that aspect would have no width.
        ((1, 1), (0.1, 0.3), [0, 0, 1, 1]),
        ((1, 1), (5.0, 9.0), [0, 0, 1, 1]),
    ],
)
def test_an_extreme_image_gets_the_largest_central_crop(size, ratio, box):
    crop = RandomResizedCrop(size=8, scale=(0.99, 1.0), ratio=ratio)
    params, _ = plan_one(crop, [size] * 3)
    assert params.tolist() == [box] * 3


def test_repeated_and_mixed_augmentations_draw_independently():
    augmentations = (
        RandomCrop(size=16, padding=8),
        RandomCrop(size=16, padding=8),
        RandomResizedCrop(size=16),
        RandomResizedCrop(size=16),
        HorizontalFlip(),
        HorizontalFlip(),
    )
    plans, _ = ViewSpec(augmentations=augmentations).plan(keys_of(4000), np.full((4000, 2), 16))
    for number, one in enumerate(plans):
        for other in plans[:number]:
            for a in one.T:
                for b in other.T:
                    assert abs(np.corrcoef(a, b)[0, 1]) < 0.06


@pytest.mark.parametrize("ratio", [(0.75, 1.3333333333333333), (1.0, 1.0), (0.5, 0.6)])
def test_the_ratio_table_is_exp_within_two_in_a_hundred_thousand(ratio):
    crop = RandomResizedCrop(size=8, ratio=ratio)
    where = np.linspace(0, 1 - 2**-32, 10_001)
    low, high = np.log(ratio)
    error = np.abs(look_up(crop.ratio_knots, where) / np.exp(low + (high - low) * where) - 1)
    assert error.max() < 2e-5
    assert crop.ratio_knots[0] == pytest.approx(ratio[0], rel=1e-11)
    assert crop.ratio_knots[-1] == pytest.approx(ratio[1], rel=1e-11)


def test_the_ratio_table_does_not_hold_the_digits_in_which_exp_differs_between_machines():
    crop = RandomResizedCrop(size=8)
    assert all(float(f"{knot:.12g}") == knot for knot in crop.ratio_knots)
    noisy = [math.nextafter(math.exp(math.log(knot)), math.inf) for knot in crop.ratio_knots]
    assert tuple(float(f"{knot:.12g}") for knot in noisy) == crop.ratio_knots


def test_a_table_of_another_ratio_is_refused():
    stored = RandomResizedCrop(size=8).model_dump(mode="json")
    assert ADAPTER.validate_json(json.dumps(stored)) == RandomResizedCrop(size=8)
    for stale in (stored | {"ratio": [0.5, 2.0]}, stored | {"ratio_knots": stored["ratio_knots"][:-1]}):
        with pytest.raises(ValidationError, match="leave it out, it is computed"):
            ADAPTER.validate_json(json.dumps(stale))


@pytest.mark.parametrize(
    "stored",
    [
        {"kind": "random_resized_crop", "size": 8, "ratio": [1.3, 0.7]},
        {"kind": "random_resized_crop", "size": 8, "scale": [1.0, 0.1]},
        {"kind": "random_resized_crop", "size": 8, "scale": [0.0, 0.1]},
        {"kind": "random_crop", "size": 0},
        {"kind": "random_crop", "size": 8, "padding": -1},
        {"kind": "random_crop", "size": 8, "fill": 256},
        {"kind": "random_crop", "size": [8, 8, 8]},
        {"kind": "horizontal_flip", "p": 1.01},
        {"kind": "resize", "size": 8, "interpolation": "lanczos"},
        {"kind": "random_grayscale", "p": -0.1},
        {"kind": "gaussian_blur", "kernel_size": 3, "sigma": [0.0, 1.0]},
        {"kind": "rand_augment", "num_ops": 0},
        {"kind": "rand_augment", "fill": 256},
        {"kind": "rand_augment", "interpolation": "bicubic"},
        {"kind": "trivial_augment_wide", "num_magnitude_bins": 1},
        {"kind": "trivial_augment_wide", "magnitude": 3},
        {"kind": "random_erasing", "scale": [0.1, 1.1]},
        {"kind": "random_erasing", "value": "random"},
        {"kind": "random_erasing", "value": []},
        {"kind": "random_erasing", "ratio": [0.0, 1.0]},
    ],
)
def test_an_impossible_augmentation_is_refused(stored):
    with pytest.raises(ValidationError):
        ADAPTER.validate_json(json.dumps(stored))
