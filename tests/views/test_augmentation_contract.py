"""What holds for every augmentation: a row's parameters and pixels depend on nothing but its key and its image."""

import random
from collections.abc import Iterator
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from logitcache.errors import DataError
from logitcache.views.augmentations import (
    Augmentation,
    GaussianBlur,
    RandAugment,
    RandomCrop,
    RandomErasing,
    TrivialAugmentWide,
)
from logitcache.views.augmentations.policies import NAMES
from logitcache.views.keys import Draws, ViewKey
from logitcache.views.spec import ViewSpec
from tests.views.examples import EXAMPLES
from tests.views.images import textured
from tests.views.planning import image_of, keys_of, plan_one

every_example = pytest.mark.parametrize(
    "augmentation", EXAMPLES, ids=[f"{number}_{example.kind}" for number, example in enumerate(EXAMPLES)]
)
COLORFUL = ("color_jitter", "random_grayscale", "rand_augment", "trivial_augment_wide")


def params_of(augmentation: Augmentation, images: Tensor) -> np.ndarray:
    """Plan a batch; where operations are drawn from the table, see to it that all of them occur."""
    params, _ = plan_one(augmentation, [tuple(images.shape[2:])] * len(images), seed=5)
    if isinstance(augmentation, RandAugment | TrivialAugmentWide):
        params[:, 0] = np.arange(len(images)) % len(NAMES)
    return params


def test_every_kind_is_an_example():
    assert {type(example) for example in EXAMPLES} == set(get_args(get_args(Augmentation)[0]))


@every_example
@settings(max_examples=6)
@given(
    data=st.data(),
    sizes=st.lists(st.tuples(*[st.integers(12, 300)] * 2), min_size=2, max_size=8),
    seed=st.integers(0, 2**64 - 1),
    view=st.integers(0, 2**32 - 1),
)
def test_the_plan_of_a_batch_is_that_of_each_image_alone_in_any_order(augmentation, data, sizes, seed, view):
    keys, given_sizes = keys_of(len(sizes), view), np.array(sizes)
    order = data.draw(st.permutations(range(len(sizes))))
    together, planned = augmentation.plan(Draws.of(seed, keys), 1, given_sizes)
    assert together.dtype == planned.dtype == np.int64
    assert planned.shape == (len(sizes), 2)
    assert np.array_equal(given_sizes, sizes)
    for row, key in enumerate(keys):
        params, size = augmentation.plan(Draws.of(seed, [key]), 1, given_sizes[row : row + 1])
        assert np.array_equal(params, together[row : row + 1])
        assert np.array_equal(size, planned[row : row + 1])
    permuted, _ = augmentation.plan(Draws.of(seed, [keys[row] for row in order]), 1, given_sizes[list(order)])
    assert np.array_equal(permuted, together[list(order)])


@every_example
def test_what_is_random_differs_from_view_to_view_and_nothing_else(augmentation):
    keys = [ViewKey(view, 0) for view in range(64)]
    params, _ = augmentation.plan(Draws.of(3, keys), 0, np.array([(40, 50)] * len(keys)))
    assert augmentation.is_random == (len(np.unique(params, axis=0)) > 1)


@every_example
@settings(max_examples=10)
@given(size=st.tuples(st.integers(1, 70), st.integers(1, 70)), channels=st.sampled_from([1, 3, 4]))
def test_pixels_have_the_planned_size_and_leave_the_image_alone(augmentation, size, channels):
    image = image_of(*size, channels)
    before = image.clone()
    assume(not isinstance(augmentation, RandomCrop) or min(size) + 2 * augmentation.padding >= 9)
    assume(not isinstance(augmentation, GaussianBlur) or min(size) >= 3)
    [params], [planned] = plan_one(augmentation, [size])
    if augmentation.kind in COLORFUL and channels == 4:
        with pytest.raises(DataError, match=r"takes images of 1 channel \(grey\) or 3 \(RGB\), these have 4"):
            augmentation.apply(image[None], params[None])
        return
    rendered = augmentation.apply(image[None], params[None])[0]
    assert rendered.dtype == torch.uint8
    assert tuple(rendered.shape) == (channels, *planned.tolist())
    assert torch.equal(image, before)


@every_example
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_of_a_batch_are_those_of_each_image_alone_however_they_lie_in_memory(augmentation, channels):
    images = torch.stack(textured(2 * len(NAMES), 23, 31, channels))
    params = params_of(augmentation, images)
    together = augmentation.apply(images, params)
    rows_of_pixels = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert torch.equal(augmentation.apply(rows_of_pixels, params), together)
    for row in range(len(images)):
        assert torch.equal(augmentation.apply(images[row : row + 1], params[row : row + 1])[0], together[row])
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    assert torch.equal(augmentation.apply(images[order], params[order.numpy()]), together[order])


@pytest.fixture
def _same_threads_after() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@every_example
@pytest.mark.usefixtures("_same_threads_after")
def test_pixels_do_not_depend_on_the_number_of_threads(augmentation):
    count = len(NAMES) if isinstance(augmentation, RandAugment | TrivialAugmentWide) else 2
    images = torch.stack(textured(count, 317, 331))
    params = params_of(augmentation, images)
    found = []
    for num_threads in (1, 2, 5):
        torch.set_num_threads(num_threads)
        found.append(augmentation.apply(images, params))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@every_example
def test_global_generators_are_neither_read_nor_moved(augmentation):
    images = torch.stack(textured(6, 20, 20))
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        found.append(augmentation.apply(images, params_of(augmentation, images)))
        assert torch.equal(torch.get_rng_state(), states[0])
        assert random.getstate() == states[1]
        assert np.random.get_state()[1].tolist() == states[2]
    assert torch.equal(*found)


@every_example
def test_augmentations_of_one_kind_draw_independently_of_each_other_and_of_other_views(augmentation):
    count, sizes = 3000, np.full((3000, 2), 30)
    plans = [
        augmentation.plan(Draws.of(3, keys_of(count, view)), ordinal, sizes)[0]
        for view, ordinal in ((0, 0), (0, 1), (1, 0))
    ]
    # A constant column correlates with nothing.
    [one, *others] = [np.where(params.std(axis=0) > 0, params, 0) for params in plans]
    for other in others:
        for a in one.T:
            for b in other.T:
                if a.any() and b.any():
                    assert abs(np.corrcoef(a, b)[0, 1]) < 0.08


def test_words_of_no_two_kinds_are_the_same():
    first = {}
    for augmentation in EXAMPLES:
        recorded = _Recorder(7, *Draws.of(7, keys_of(3))[1:])
        augmentation.plan(recorded, 0, np.full((3, 2), 40))  # type: ignore[arg-type]
        for stream in recorded.streams:
            assert first.setdefault(stream, augmentation.kind) == augmentation.kind


class _Recorder:
    """Draws that remember of which streams words were taken."""

    def __init__(self, seed: int, views: np.ndarray, indices: np.ndarray) -> None:
        self.draws, self.indices, self.streams = Draws(seed, views, indices), indices, list[str]()

    def words(self, stream: str, ordinal: int, count: int) -> np.ndarray:
        self.streams.append(stream)
        return self.draws.words(stream, ordinal, count)


@every_example
def test_the_stored_form_is_read_back_equal(augmentation):
    spec = ViewSpec(num_views=3, seed=2**64 - 1, augmentations=(augmentation, RandomErasing(p=1 / 3)))
    stored = spec.model_dump_json()
    assert ViewSpec.model_validate_json(stored) == spec
    assert ViewSpec.model_validate_json(stored).digest() == spec.digest()


def test_the_digest_tells_apart_all_that_decides_the_pixels():
    specs = [ViewSpec(augmentations=(one,), seed=seed) for one in EXAMPLES for seed in (0, 2**32)]
    assert len({spec.digest() for spec in specs}) == len(specs)
    assert ViewSpec(num_views=9).digest() == ViewSpec(num_views=1).digest()
