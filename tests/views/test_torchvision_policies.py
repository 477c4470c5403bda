"""RandAugment and TrivialAugment Wide mean what torchvision's transforms of the same name mean."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from logitcache.errors import DataError
from logitcache.views.augmentations import Augmentation, RandAugment, TrivialAugmentWide
from logitcache.views.augmentations.policies import NAMES, UNSIGNED, magnitude_of, narrow_range, wide_range
from tests.views.distributions import same_counts
from tests.views.images import textured
from tests.views.planning import image_of, plan_one

ADAPTER: TypeAdapter[Augmentation] = TypeAdapter(Augmentation)
TITLES = ["".join(part.title() for part in name.split("_")) for name in NAMES]
WARPS = [("nearest", None), ("nearest", 255), ("bilinear", None), ("bilinear", 0), ("bilinear", (9, 90, 200))]


def render_as_planned(transform: Any, image: Tensor, row: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Run a policy of torchvision with the draws of a planned row: [number, bin, sign] of each operation."""
    steps = iter(row.reshape(-1, 3).tolist())
    current = [0, 0, 0]

    def operation(table: dict[str, Any]) -> tuple[str, Any]:
        current[:] = next(steps)
        name = list(table)[current[0]]
        return name, table[name]

    with monkeypatch.context() as patched:
        patched.setattr(transform, "_get_random_item", operation)
        patched.setattr(torch, "randint", lambda high, size: torch.tensor(current[1]))
        patched.setattr(torch, "rand", lambda size: torch.tensor(0.4 if current[2] < 0 else 0.6))
        rendered: Tensor = transform(image)
    return rendered


@pytest.mark.parametrize("policy", [v2.RandAugment, v2.TrivialAugmentWide])
def test_operations_are_numbered_as_in_torchvision(policy):
    table = policy._AUGMENTATION_SPACE
    assert list(table) == TITLES
    assert [signed for _, signed in table.values()] == [name not in UNSIGNED for name in NAMES]


@pytest.mark.parametrize(("policy", "range_of"), [(v2.RandAugment, narrow_range), (v2.TrivialAugmentWide, wide_range)])
@pytest.mark.parametrize("num_bins", [2, 3, 10, 31])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (224, 301), (1, 7)])
def test_magnitudes_are_those_of_torchvision(policy, range_of, num_bins, height, width):
    for name, (magnitudes, _) in zip(NAMES, policy._AUGMENTATION_SPACE.values(), strict=True):
        expected = magnitudes(num_bins, height, width)
        if expected is not None:
            found = [magnitude_of(name, range_of(name, height, width), num_bins, number) for number in range(num_bins)]
            assert found == [float(value) for value in expected], name


@pytest.mark.parametrize(("interpolation", "fill"), WARPS)
@pytest.mark.parametrize(("height", "width", "channels"), [(33, 41, 3), (2, 5, 3), (32, 32, 1)])
def test_trivial_augment_gives_the_pixels_of_torchvision(interpolation, fill, height, width, channels, monkeypatch):
    fill = fill[:channels] if isinstance(fill, tuple) else fill
    ours = TrivialAugmentWide(interpolation=interpolation, fill=fill)
    theirs = v2.TrivialAugmentWide(interpolation=InterpolationMode(interpolation), fill=fill)
    rows = [
        (number, bin_number, sign) for number in range(len(NAMES)) for bin_number in (0, 1, 13, 30) for sign in (1, -1)
    ]
    params = np.array(rows, dtype=np.int64)
    images = torch.stack(textured(len(rows), height, width, channels))
    expected = [render_as_planned(theirs, image, row, monkeypatch) for image, row in zip(images, params, strict=True)]
    rendered = ours.apply(images, params)
    for row, found, wanted in zip(rows, rendered, expected, strict=True):
        assert torch.equal(found, wanted), (NAMES[row[0]], row)


@pytest.mark.parametrize(("interpolation", "fill"), WARPS)
@pytest.mark.parametrize(("height", "width"), [(3, 3001), (1999, 2), (33, 32), (31, 30)])
def test_translations_give_the_pixels_of_torchvision_at_any_size(interpolation, fill, height, width, monkeypatch):
    theirs = v2.TrivialAugmentWide(34, interpolation=InterpolationMode(interpolation), fill=fill)
    ours = TrivialAugmentWide(num_magnitude_bins=34, interpolation=interpolation, fill=fill)
    moves = [NAMES.index("translate_x"), NAMES.index("translate_y")]
    rows = [(number, bin_number, sign) for number in moves for bin_number in (0, 1, 2, 31, 32, 33) for sign in (1, -1)]
    image = image_of(height, width)
    for row in np.array(rows):
        found = ours.apply(image[None], row[None])[0]
        assert torch.equal(found, render_as_planned(theirs, image, row, monkeypatch)), row


@pytest.mark.parametrize(("interpolation", "fill"), WARPS)
@pytest.mark.parametrize(("num_ops", "magnitude", "num_bins"), [(2, 9, 31), (4, 3, 4), (1, 0, 2)])
def test_rand_augment_gives_the_pixels_of_torchvision(interpolation, fill, num_ops, magnitude, num_bins, monkeypatch):
    options = {"num_ops": num_ops, "magnitude": magnitude, "num_magnitude_bins": num_bins, "fill": fill}
    ours = RandAugment(interpolation=interpolation, **options)
    theirs = v2.RandAugment(interpolation=InterpolationMode(interpolation), **options)
    params, _ = plan_one(ours, [(31, 44)] * 40)
    images = torch.stack(textured(40, 31, 44))
    expected = [render_as_planned(theirs, image, row, monkeypatch) for image, row in zip(images, params, strict=True)]
    assert torch.equal(ours.apply(images, params), torch.stack(expected))


def operations_drawn(transform: Any, count: int) -> list[tuple[Any, ...]]:
    """Sample what a policy of torchvision applies: names and signed magnitudes, one tuple for an image."""
    applied: list[Any] = []

    def record(image: Tensor, name: str, magnitude: float, **_: Any) -> Tensor:
        applied.append((name, magnitude + 0.0))
        return image

    transform._apply_image_or_video_transform = record
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(count):
            transform(torch.empty((1, 8, 8), dtype=torch.uint8))
    steps = len(applied) // count
    return [tuple(applied[start : start + steps]) for start in range(0, len(applied), steps)]


def described(row: np.ndarray, range_of: Any, num_bins: int) -> tuple[Any, ...]:
    steps = []
    for number, bin_number, sign in row.reshape(-1, 3).tolist():
        name = NAMES[number]
        magnitude = magnitude_of(name, range_of(name, 8, 8), num_bins, bin_number)
        if name in ("identity", "auto_contrast", "equalize"):
            magnitude = 0.0
        steps.append((TITLES[number], (magnitude if name in UNSIGNED else sign * magnitude) + 0.0))
    return tuple(steps)


@pytest.mark.parametrize(
    ("ours", "theirs", "range_of"),
    [
        (RandAugment(num_ops=1), v2.RandAugment(num_ops=1), narrow_range),
        (RandAugment(num_ops=2, magnitude=2), v2.RandAugment(num_ops=2, magnitude=2), narrow_range),
        (TrivialAugmentWide(num_magnitude_bins=4), v2.TrivialAugmentWide(num_magnitude_bins=4), wide_range),
    ],
)
def test_operations_are_distributed_as_those_of_torchvision(ours, theirs, range_of):
    count = 6000
    params, _ = plan_one(ours, [(8, 8)] * count)
    found = [described(row, range_of, ours.num_magnitude_bins) for row in params]
    expected = operations_drawn(theirs, count)
    for step in range(len(expected[0])):
        same_counts([row[step] for row in found], [row[step] for row in expected])
    kinds = [[str([name for name, _ in row]) for row in rows] for rows in (found, expected)]
    same_counts(*kinds)
    signs = params.reshape(count, -1, 3)[:, :, 2]
    assert set(signs.ravel().tolist()) == {-1, 1}


def test_images_of_identities_alone_are_not_copied():
    images = torch.stack(textured(3, 9, 9))
    assert RandAugment().apply(images, np.array([[0, 9, 1] * 2] * 3)) is images
    assert TrivialAugmentWide().apply(images, np.array([[0, 5, -1]] * 3)) is images


@pytest.mark.parametrize("kind", [RandAugment, TrivialAugmentWide])
def test_fill_of_other_channels_is_refused_whatever_was_drawn(kind):
    policy = kind(fill=(1, 2, 3))
    image = image_of(9, 9, 1)[None]
    params, _ = plan_one(policy, [(9, 9)])
    with pytest.raises(DataError, match=rf"{policy.kind}.fill has 3 values \[1, 2, 3\], the images have 1 channels"):
        policy.apply(image, params)


@pytest.mark.parametrize("magnitude", [31, 400])
def test_a_magnitude_outside_the_bins_is_refused(magnitude):
    with pytest.raises(ValidationError, match=f"magnitude {magnitude} is not one of 31 bins"):
        ADAPTER.validate_json(json.dumps({"kind": "rand_augment", "magnitude": magnitude}))
