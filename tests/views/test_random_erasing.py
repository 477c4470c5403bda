"""Random erasing: rectangles as torchvision draws them, noise that the plan alone decides."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torchvision.transforms import v2

from logitcache.errors import DataError
from logitcache.views.augmentations import RandomErasing
from logitcache.views.keys import philox
from tests.views.distributions import as_often_as, drawn, same_distribution
from tests.views.images import textured
from tests.views.planning import image_of, plan_one

sides = st.integers(1, 600)


@given(
    sizes=st.lists(st.tuples(sides, sides), min_size=1, max_size=12),
    seed=st.integers(0, 2**64 - 1),
    scale=st.tuples(*[st.floats(0, 1)] * 2).map(sorted),
    ratio=st.tuples(*[st.floats(0.01, 100)] * 2).map(sorted),
)
def test_rectangles_are_smaller_than_the_image_and_inside_it(sizes, seed, scale, ratio):
    params, planned = plan_one(RandomErasing(p=1.0, scale=tuple(scale), ratio=tuple(ratio)), sizes, seed)
    corners, extents = params[:, :2], params[:, 2:4]
    assert (corners >= 0).all()
    assert (corners + extents <= np.array(sizes)).all()
    assert (extents < np.array(sizes)).all()
    assert planned.tolist() == [list(size) for size in sizes]


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((32, 32), {}),
        ((224, 160), {}),
        ((30, 90), {"scale": (0.3, 0.5), "ratio": (0.5, 2.0)}),
        # Most tries do not fit, so that often nothing is erased.
        ((10, 60), {"scale": (0.6, 1.0)}),
        ((5, 4), {"scale": (0.0, 0.2)}),
    ],
)
def test_rectangles_are_distributed_as_those_of_torchvision(size, options):
    count = 2500
    expected = drawn(v2.RandomErasing(**options).make_params, size, ["i", "j", "h", "w"], count)
    expected[(expected[:, 2:] == size).all(axis=1)] = 0  # their way to say that nothing is erased
    params, _ = plan_one(RandomErasing(p=1.0, **options), [size] * count, seed=3)
    same_distribution(params[:, :4], expected)


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_images_are_erased_with_probability_p(p):
    params, _ = plan_one(RandomErasing(p=p), [(64, 64)] * 3000)
    chosen = params[:, 2:4].all(axis=1)
    as_often_as(p, chosen.astype(int))
    if p:
        always, _ = plan_one(RandomErasing(p=1.0), [(64, 64)] * 3000, seed=8)
        same_distribution(params[chosen, :4], always[:, :4])


@pytest.mark.parametrize("value", [0, 255, (7,), (1, 100, 200)])
def test_constant_erasing_gives_the_pixels_of_torchvision(value):
    erasing, theirs = RandomErasing(p=0.7, value=value), v2.RandomErasing(value=value)
    images = torch.stack(textured(30, 23, 31))
    before = images.clone()
    params, _ = plan_one(erasing, [(23, 31)] * 30)
    levels = torch.tensor(theirs.value)[:, None, None]
    expected = [
        theirs.transform(image, dict(zip("ijhw", row, strict=True)) | {"v": levels})
        for image, row in zip(images, params[:, :4].tolist(), strict=True)
    ]
    assert torch.equal(erasing.apply(images, params), torch.stack(expected))
    assert torch.equal(images, before)


def words_of(key: tuple[int, int], counter: int) -> list[int]:
    zero = np.zeros(1, dtype=np.uint64)
    return [int(word[0]) for word in philox((zero + np.uint64(counter), zero, zero, zero), key)]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_noise_is_the_bytes_of_the_words_of_its_key(channels):
    erasing = RandomErasing(p=1.0, value="noise")
    image = image_of(20, 20, channels)
    row = [3, 5, 7, 9, 123, 2**32 - 1]
    rendered = erasing.apply(image[None], np.array([row]))[0]
    words = [word for counter in range(channels * 63 // 16 + 1) for word in words_of((123, 2**32 - 1), counter)]
    noise = b"".join(word.to_bytes(4, "little") for word in words)[: channels * 63]
    expected = image.clone()
    expected[:, 3:10, 5:14] = torch.frombuffer(bytearray(noise), dtype=torch.uint8).reshape(channels, 7, 9)
    assert torch.equal(rendered, expected)


def test_noise_is_uniform_and_other_in_every_image_and_view():
    erasing = RandomErasing(p=1.0, scale=(0.5, 0.9), value="noise")
    params, _ = plan_one(erasing, [(60, 60)] * 40)
    assert len(np.unique(params[:, 4:])) == 80
    params[:, :4] = [0, 0, 50, 50]
    boxes = erasing.apply(torch.zeros((40, 3, 60, 60), dtype=torch.uint8), params)[:, :, :50, :50]
    assert stats.chisquare(np.bincount(boxes.numpy().ravel(), minlength=256)).pvalue > 1e-4
    assert len({box.numpy().tobytes() for box in boxes}) == 40
    assert np.abs(np.corrcoef(boxes.flatten(1).numpy()) - np.eye(40)).max() < 0.06


def test_values_of_other_channels_are_refused_even_where_nothing_is_erased():
    with pytest.raises(DataError, match=r"random_erasing.value has 3 values \[1, 2, 3\], the images have 1 channels"):
        RandomErasing(value=(1, 2, 3)).apply(image_of(9, 9, 1)[None], np.zeros((1, 6), dtype=np.int64))
