"""Augmentations: the parameters that are planned, and the pixels that they give."""

import json
import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from logitcache.errors import DataError
from logitcache.views.augmentations import (
    Augmentation,
    CenterCrop,
    HorizontalFlip,
    RandomCrop,
    RandomResizedCrop,
    Resize,
)
from logitcache.views.augmentations.base import look_up
from logitcache.views.spec import ViewSpec
from tests.views.planning import image_of, keys_of, plan_one

ADAPTER: TypeAdapter[Augmentation] = TypeAdapter(Augmentation)
EXAMPLES: list[Augmentation] = [
    Resize(size=13),
    Resize(size=(7, 40), interpolation="bicubic"),
    CenterCrop(size=12),
    CenterCrop(size=(50, 9)),
    RandomCrop(size=1),
    RandomCrop(size=(5, 9), padding=4, padding_mode="edge"),
    RandomResizedCrop(size=8),
    RandomResizedCrop(size=(5, 11), scale=(0.5, 0.9), ratio=(0.2, 7.0), interpolation="nearest"),
    HorizontalFlip(),
    HorizontalFlip(p=0.2),
]
sides = st.integers(1, 600)
image_sizes = st.lists(st.tuples(sides, sides), min_size=1, max_size=12)
crop_sizes = st.integers(1, 700) | st.tuples(st.integers(1, 700), st.integers(1, 700))


def test_every_kind_is_an_example_here():
    kinds = {type(example) for example in EXAMPLES}
    assert kinds == set(get_args(get_args(Augmentation)[0]))


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
    scale=st.tuples(*[st.floats(1e-6, 1.5)] * 2).map(sorted),
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
    together = spec.plan(keys, np.array(sizes))
    alone = [spec.plan([key], np.array([size])) for key, size in zip(keys, sizes, strict=True)]
    permuted = spec.plan([keys[row] for row in order], np.array(sizes)[order])
    for step, params in enumerate(together):
        assert params.dtype == np.int64
        assert np.array_equal(params, np.concatenate([one[step] for one in alone]))
        assert np.array_equal(params[order], permuted[step])


@pytest.mark.parametrize("augmentation", EXAMPLES, ids=repr)
@settings(max_examples=15)
@given(size=st.tuples(st.integers(1, 70), st.integers(1, 70)), channels=st.sampled_from([1, 3, 4]))
def test_pixels_have_the_planned_size_and_leave_the_image_alone(augmentation, size, channels):
    image = image_of(*size, channels)
    before = image.clone()
    assume(not isinstance(augmentation, RandomCrop) or min(size) + 2 * augmentation.padding >= 9)
    [params], [planned] = plan_one(augmentation, [size])
    rendered = augmentation.apply(image[None], params[None])[0]
    assert rendered.dtype == torch.uint8
    assert tuple(rendered.shape) == (channels, *planned.tolist())
    assert torch.equal(image, before)


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
    crop = RandomCrop(size=3, padding=padding, padding_mode=mode)
    spec = ViewSpec(augmentations=(crop,))
    if fits:
        [rendered] = spec.render([image_of(*size)], keys_of(1))
        assert rendered.shape == (3, 3, 3)
        return
    with pytest.raises(DataError, match=rf"image 1 of size \({size[0]}, {size[1]}\) by {padding} with {mode}"):
        spec.render([image_of(20, 20), image_of(*size)], keys_of(2))


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
    plans = ViewSpec(augmentations=augmentations).plan(keys_of(4000), np.full((4000, 2), 16))
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
    ],
)
def test_an_impossible_augmentation_is_refused(stored):
    with pytest.raises(ValidationError):
        ADAPTER.validate_json(json.dumps(stored))


@pytest.mark.parametrize("augmentation", EXAMPLES, ids=repr)
def test_the_stored_form_is_read_back_equal(augmentation):
    spec = ViewSpec(num_views=3, seed=2**64 - 1, augmentations=(augmentation, HorizontalFlip(p=1 / 3)))
    stored = spec.model_dump_json()
    assert ViewSpec.model_validate_json(stored) == spec
    assert ViewSpec.model_validate_json(stored).digest() == spec.digest()


def test_the_digest_tells_apart_all_that_decides_the_pixels():
    specs = [ViewSpec(augmentations=(one,), seed=seed) for one in EXAMPLES for seed in (0, 2**32)]
    assert len({spec.digest() for spec in specs}) == len(specs)
    assert ViewSpec(num_views=9).digest() == ViewSpec(num_views=1).digest()
