"""Colors and blurring mean what torchvision's transforms of the same name mean."""

import json

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from scipy import stats
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from logitcache.errors import DataError
from logitcache.views.augmentations import Augmentation, ColorJitter, GaussianBlur, RandomGrayscale
from logitcache.views.augmentations.color import adjust_contrast
from tests.views.distributions import as_often_as, drawn, same_counts, same_distribution
from tests.views.images import textured
from tests.views.planning import image_of, plan_one

ADAPTER: TypeAdapter[Augmentation] = TypeAdapter(Augmentation)
NAMES = ("brightness", "contrast", "saturation", "hue")
SETTINGS = [
    {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1},
    {"brightness": 3.0, "contrast": (0.0, 8.0), "saturation": (1.0, 1.0), "hue": 0.5},
    {"contrast": (0.2, 0.4)},
    {"hue": (-0.5, -0.2)},
    {"saturation": (2.0, 2.0), "brightness": 0.0},
    {},
]


def theirs_of(row: np.ndarray, given: dict[str, object]) -> dict[str, object]:
    """Write a planned row as the parameters of torchvision's ColorJitter, which leaves out what has no limits."""
    limits = v2.ColorJitter(**given)
    factors = {
        f"{name}_factor": None if getattr(limits, name) is None else value / 4096
        for name, value in zip(NAMES, row[5:].tolist(), strict=True)
    }
    return {"fn_idx": torch.from_numpy(row[1:5]), **factors}


@pytest.mark.parametrize("given", SETTINGS, ids=repr)
@pytest.mark.parametrize(("height", "width", "channels"), [(29, 31, 3), (1, 1, 3), (17, 90, 1)])
def test_color_jitter_gives_the_pixels_of_torchvision(given, height, width, channels):
    jitter, count = ColorJitter(**given), 12
    images = torch.stack([*textured(count // 2, height, width, channels)] + [image_of(height, width, channels)] * 6)
    params, _ = plan_one(jitter, [(height, width)] * count)
    expected = [
        v2.ColorJitter(**given).transform(image, theirs_of(row, given))
        for image, row in zip(images, params, strict=True)
    ]
    assert torch.equal(jitter.apply(images, params), torch.stack(expected))


@pytest.mark.parametrize("given", SETTINGS[:2], ids=repr)
def test_color_jitter_is_distributed_as_that_of_torchvision(given):
    count = 2500
    names = [f"{name}_factor" for name in NAMES if getattr(v2.ColorJitter(**given), name) is not None]
    expected = drawn(v2.ColorJitter(**given).make_params, (4, 4), names, count)
    params, _ = plan_one(ColorJitter(**given), [(4, 4)] * count)
    columns = [5 + NAMES.index(name.removesuffix("_factor")) for name in names]
    same_distribution(params[:, columns] / 4096, expected)
    assert {tuple(sorted(row)) for row in params[:, 1:5].tolist()} == {(0, 1, 2, 3)}
    orders = drawn(lambda images: {"order": str(torch.randperm(4).tolist())}, (1, 1), ["order"], count)
    same_counts([str(row) for row in params[:, 1:5].tolist()], orders[:, 0].tolist())
    order_and_factors = params[:, [1, 2, 3, 5, 6, 7, 8]]
    moving = order_and_factors[:, order_and_factors.std(axis=0) > 0]
    assert np.abs(np.corrcoef(moving[:, 3:].T, moving[:, :3].T)[-3:, :-3]).max() < 0.08


def test_order_and_factors_do_not_tell_what_is_chosen():
    jitter = ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.4)
    params, _ = plan_one(jitter, [(4, 4)] * 4000)
    assert np.abs(np.corrcoef(params.T)[0, 1:]).max() < 0.06


@pytest.mark.parametrize("kind", [ColorJitter, RandomGrayscale])
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_images_are_chosen_with_probability_p(kind, p):
    params, _ = plan_one(kind(p=p), [(4, 4)] * 3000)
    as_often_as(p, params[:, 0])


def test_what_is_not_chosen_is_left_as_it_is():
    images = torch.stack(textured(20, 9, 9))
    for augmentation in (
        ColorJitter(brightness=(3.0, 4.0), p=0.5),
        GaussianBlur(kernel_size=3, sigma=(1.0, 2.0), p=0.5),
    ):
        params, _ = plan_one(augmentation, [(9, 9)] * 20)
        same = (augmentation.apply(images, params) == images).flatten(1).all(dim=1)
        assert same.tolist() == (params[:, 0] == 0).tolist()
        assert 0 < same.sum() < 20


@pytest.mark.parametrize("channels", [1, 3])
def test_contrast_uses_the_exact_mean_where_a_float32_sum_is_rounded(channels):
    # The mean is 204 exactly, and a factor of 1.75 turns every multiple of 4 into a whole number: there the smallest
    # error of the mean moves a pixel by a whole level.
    count = 701 * 603
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    grey = torch.tensor(([193, 215] * 100_000 + [204] * count)[:count], dtype=torch.uint8)[order].reshape(1, 701, 603)
    image = grey if channels == 1 else _colors_of(grey)
    assert int(grey.sum()) == 204 * count > 2**24
    levels = np.clip((7 * np.arange(256) - 3 * 204) // 4, 0, 255).astype(np.uint8)
    assert np.array_equal(adjust_contrast(image, 1.75).numpy(), levels[image.numpy()])


def _colors_of(grey: Tensor) -> Tensor:
    """Find an image whose grey, as torchvision rounds it, is `grey`."""
    image = grey.repeat(3, 1, 1) + torch.tensor([[[1]], [[1]], [[1]]], dtype=torch.uint8)
    assert torch.equal(F.rgb_to_grayscale(image), grey)
    return image


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("factor", [0.0, 0.31, 1.0, 1.9, 40.0])
def test_contrast_gives_the_pixels_of_torchvision_where_its_sum_is_exact(factor, channels):
    for image in textured(3, 211, 199, channels):
        assert torch.equal(adjust_contrast(image, factor), F.adjust_contrast(image, factor))


@pytest.mark.parametrize("channels", [1, 3])
def test_random_grayscale_gives_the_pixels_of_torchvision(channels):
    images = torch.stack([image_of(13, 7, channels, seed) for seed in range(6)])
    rendered = RandomGrayscale().apply(images, np.array([[0], [1]] * 3))
    theirs = v2.RandomGrayscale(p=1.0)
    expected = [theirs(image) if row % 2 else image for row, image in enumerate(images)]
    assert torch.equal(rendered, torch.stack(expected))


@pytest.mark.parametrize("kernel_size", [1, 3, (3, 9), (7, 1)])
@pytest.mark.parametrize("channels", [1, 3])
def test_gaussian_blur_gives_the_pixels_of_torchvision(kernel_size, channels):
    blur = GaussianBlur(kernel_size=kernel_size, sigma=(0.1, 6.0))
    theirs = v2.GaussianBlur(kernel_size)
    images = torch.stack(textured(8, 21, 34, channels))
    params, _ = plan_one(blur, [(21, 34)] * 8)
    sigmas = (params[:, 1] / 65536).tolist()
    expected = [theirs.transform(image, {"sigma": [sigma] * 2}) for image, sigma in zip(images, sigmas, strict=True)]
    assert torch.equal(blur.apply(images, params), torch.stack(expected))


def test_the_width_of_a_blur_is_distributed_as_that_of_torchvision():
    params, _ = plan_one(GaussianBlur(kernel_size=3, p=0.3), [(9, 9)] * 3000)
    expected = drawn(v2.GaussianBlur(3).make_params, (9, 9), ["sigma"], 3000)[:, 0, 0]
    chosen = params[:, 0] == 1
    for sigmas in (params[:, 1], params[chosen, 1], params[~chosen, 1]):
        assert stats.ks_2samp(sigmas / 65536, expected).pvalue > 1e-4
    as_often_as(0.3, params[:, 0])


@pytest.mark.parametrize(
    ("kernel_size", "size", "fits"), [((9, 5), (3, 5), True), ((9, 5), (2, 5), False), ((9, 5), (3, 4), False)]
)
def test_an_image_too_small_to_be_blurred_is_refused_before_torch_does(kernel_size, size, fits):
    blur, sizes = GaussianBlur(kernel_size=kernel_size), [(20, 20), size]
    if fits:
        params, _ = plan_one(blur, sizes)
        assert blur.apply(image_of(*size)[None], params[1:])[0].shape == (3, *size)
        return
    with pytest.raises(DataError, match=rf"image 1 of size \({size[0]}, {size[1]}\) .* height 5 and width 9"):
        plan_one(blur, sizes)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"kind": "color_jitter", "brightness": -0.1}, "cannot be negative"),
        ({"kind": "color_jitter", "hue": -0.1}, "cannot be negative"),
        ({"kind": "color_jitter", "hue": 0.51}, r"from -0.5 to 0.5.*\[-0.51, 0.51\]"),
        ({"kind": "color_jitter", "hue": [0.2, 0.1]}, "the lower one first"),
        ({"kind": "color_jitter", "contrast": [-0.5, 1.0]}, "factors go from 0"),
        ({"kind": "color_jitter", "saturation": 1e30}, "factors go from 0"),
        ({"kind": "color_jitter", "saturation": [0.1, 0.2, 0.3]}, "at most 2 items"),
        ({"kind": "gaussian_blur", "kernel_size": 4}, "odd"),
        ({"kind": "gaussian_blur", "kernel_size": [3, 2]}, "odd"),
        ({"kind": "gaussian_blur", "kernel_size": 3, "sigma": [2.0, 1.0]}, "smaller number comes first"),
    ],
)
def test_impossible_limits_are_refused_as_torchvision_does(stored, message):
    with pytest.raises(ValidationError, match=message):
        ADAPTER.validate_json(json.dumps(stored))
