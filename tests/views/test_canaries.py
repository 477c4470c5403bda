"""Canaries: which fault is which, by what is still equal."""

import io
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from logitcache.cache.reader import open_cache
from logitcache.errors import DataError, MismatchError, ReplayMismatchError
from logitcache.models import Preprocessing
from logitcache.teacher.models import TeacherSource
from logitcache.teacher.precompute import PrecomputeRecipe, precompute
from logitcache.views import canaries
from logitcache.views.augmentations import HorizontalFlip, RandomCrop, RandomResizedCrop, crops
from logitcache.views.datasets import fingerprint
from logitcache.views.keys import ViewKey
from logitcache.views.spec import Views, ViewSpec
from tests.views.images import Images, textured

NUM_IMAGES = 60
SPEC = ViewSpec(num_views=4, seed=11, augmentations=(RandomResizedCrop(size=24), HorizontalFlip()))
PHOTOS = textured(NUM_IMAGES, 40, 44)
Recorded = tuple[tuple[canaries.Canary, ...], Tensor]


@pytest.fixture(scope="module")
def recorded() -> Recorded:
    return canaries.take(Views(Images(PHOTOS), SPEC), canaries.choose(SPEC.seed, NUM_IMAGES, SPEC.num_views))


def compare(recorded: Recorded, images: list[Tensor] = PHOTOS, spec: ViewSpec = SPEC) -> canaries.CanaryReport:
    return canaries.compare(Views(Images(images), spec), *recorded)


def counts(report: canaries.CanaryReport) -> tuple[int, int, int]:
    assert report.num_canaries == 32
    return report.raw_equal, report.plans_equal, report.augmented_equal


def refusal(report: canaries.CanaryReport, level: canaries.Level) -> str:
    """Return the message of the error, which holds the three counts whatever the fault."""
    with pytest.raises(ReplayMismatchError) as refused:
        canaries.judge(report, level, "caches/c100.zarr, spec 91c0")
    message = str(refused.value)
    for name, equal in zip(("raw images", "plans", "augmented"), counts(report), strict=True):
        assert f"{name} {equal}/32 equal" in message
    assert message.startswith("augmented images differ from those the teacher saw (caches/c100.zarr, spec 91c0)\n")
    assert f"mean |d| {report.mean_difference:.2f}, max {report.max_difference}" in message
    return message


def encoded(image: Tensor) -> Tensor:
    """Send an image through JPEG."""
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=90)
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1).contiguous()


def noise(image: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    # Every fourth pixel by one level, as other kernels do.
    step = torch.randint(-4, 5, image.shape, generator=generator).div(4, rounding_mode="trunc").int()
    return (image.int() + step).clamp(0, 255).to(torch.uint8)


def test_the_same_images_and_plans_pass_at_every_level(recorded):
    report = compare(recorded)
    assert counts(report) == (32, 32, 32)
    assert (report.equal, report.mean_difference, report.max_difference) == (True, 0.0, 0)
    assert canaries.judge(report, "strict", "") is None
    assert canaries.judge(report, "numeric", "") is None


def test_another_number_of_views_is_no_fault(recorded):
    assert compare(recorded, spec=SPEC.model_copy(update={"num_views": 9})).equal


@pytest.mark.parametrize("seed", [12, 11 + 2**32])
@pytest.mark.parametrize("level", ["strict", "numeric"])
def test_another_seed_changes_the_plans_alone(recorded, seed, level):
    report = compare(recorded, spec=SPEC.model_copy(update={"seed": seed}))
    assert counts(report) == (32, 0, 0)
    assert report.mean_difference > 5
    assert "plans differ: another seed" in refusal(report, level)


FAULTY_IMAGES = {
    "shifted by one": PHOTOS[1:] + PHOTOS[:1],
    "encoded again": [encoded(image) for image in PHOTOS],
    "BGR": [image.flip(0) for image in PHOTOS],
    "one level off": [noise(image) for image in PHOTOS],
}


@pytest.mark.parametrize("fault", FAULTY_IMAGES)
@pytest.mark.parametrize("level", ["strict", "numeric"])
def test_other_images_change_the_raw_ones_and_no_plan(recorded, fault, level):
    report = compare(recorded, FAULTY_IMAGES[fault])
    assert counts(report) == (0, 32, 0)
    assert "the decoded images differ" in refusal(report, level)


def test_one_changed_image_is_seen(recorded):
    index = recorded[0][7].index
    report = compare(recorded, [*PHOTOS[:index], PHOTOS[index] ^ 1, *PHOTOS[index + 1 :]])
    equal = 32 - sum(canary.index == index for canary in recorded[0])
    assert counts(report)[:2] == (equal, 32)
    assert "the decoded images differ" in refusal(report, "numeric")


def test_numeric_drift_is_refused_when_strict_and_warned_of_when_numeric(recorded, monkeypatch):
    resize = crops.resize
    monkeypatch.setattr(crops, "resize", lambda *arguments: noise(resize(*arguments)))
    report = compare(recorded)
    assert counts(report) == (32, 32, 0)
    assert 0 < report.mean_difference <= 0.5
    assert report.max_difference == 1
    assert report.drift
    message = refusal(report, "strict")
    assert "numeric drift (limits 0.5 / 16)" in message
    assert "--verify numeric" in message
    assert canaries.judge(report, "numeric", "caches/c100.zarr, spec 91c0") == message


@pytest.mark.parametrize(
    ("interpolation", "antialias"), [("bicubic", True), ("nearest", True), ("bilinear", False)], ids=str
)
@pytest.mark.parametrize("level", ["strict", "numeric"])
def test_another_kernel_is_more_than_drift(recorded, monkeypatch, interpolation, antialias, level):
    def resize(image, size, _):
        return F.resize(image, size, InterpolationMode(interpolation), antialias=antialias)

    monkeypatch.setattr(crops, "resize", resize)
    report = compare(recorded)
    raw, plans, augmented = counts(report)
    assert (raw, plans) == (32, 32)
    assert augmented < 32
    assert not report.drift
    assert "another resize kernel" in refusal(report, level)


@pytest.mark.parametrize(
    "update",
    [
        {"augmentations": (RandomResizedCrop(size=24, scale=(0.1, 1.0)), HorizontalFlip())},
        {"augmentations": (RandomResizedCrop(size=24), HorizontalFlip(p=0.0))},
        {"augmentations": (RandomResizedCrop(size=24),)},
    ],
)
def test_other_augmentations_change_plans(recorded, update):
    report = compare(recorded, spec=SPEC.model_copy(update=update))
    assert report.raw_equal == 32
    assert report.plans_equal < 32
    assert "other augmentations" in refusal(report, "numeric")


def test_another_shape_is_as_far_off_as_can_be(recorded):
    spec = SPEC.model_copy(update={"augmentations": (RandomResizedCrop(size=20), HorizontalFlip())})
    report = compare(recorded, spec=spec)
    assert (report.mean_difference, report.max_difference) == (255.0, 255)
    refusal(report, "numeric")


def test_images_that_have_grown_apart_are_a_mismatch_too(recorded):
    plain = ViewSpec(augmentations=(HorizontalFlip(),))
    keys = [ViewKey(0, index) for index in range(32)]
    taken = canaries.take(Views(Images(PHOTOS), plain), keys)
    grown = [*PHOTOS[:5], *textured(1, 41, 44), *PHOTOS[6:]]
    report = compare(taken, grown, plain)
    assert counts(report) == (31, 32, 31)
    assert report.max_difference == 255
    refusal(report, "numeric")


def test_images_of_different_sizes_without_a_crop_are_named_at_once():
    plain = Views(Images([*textured(3, 9, 9), *textured(1, 9, 8)]), ViewSpec(augmentations=(HorizontalFlip(),)))
    with pytest.raises(DataError, match=r"'image 0' gives \(3, 9, 9\), 'image 3' gives \(3, 9, 8\)"):
        canaries.take(plain, canaries.choose(0, 4, 1))


@pytest.mark.parametrize(("num_images", "num_views"), [(1, 1), (5, 1), (31, 1), (32, 1), (8, 4), (1, 32)])
def test_a_small_data_set_has_a_canary_for_every_key(num_images, num_views):
    keys = canaries.choose(3, num_images, num_views)
    assert sorted(keys) == keys
    assert Counter(keys) == Counter(ViewKey(v, i) for v in range(num_views) for i in range(num_images))
    views = Views(Images(textured(num_images, 12, 12)), ViewSpec(num_views=num_views))
    report = canaries.compare(views, *canaries.take(views, keys))
    assert report.equal
    assert report.num_canaries == len(keys)


@pytest.mark.parametrize(("num_images", "num_views"), [(33, 1), (1, 33), (11, 3), (60_000, 16), (2**40, 2**31)])
def test_canaries_are_32_different_keys_from_all_over(num_images, num_views):
    keys = canaries.choose(3, num_images, num_views)
    assert len(set(keys)) == 32
    assert sorted(keys) == keys
    assert all(0 <= view < num_views and 0 <= index < num_images for view, index in keys)
    if num_images > 32:
        assert keys != canaries.choose(4, num_images, num_views) or num_images < 40
        assert max(index for _, index in keys) > num_images // 2


def test_a_random_crop_is_checked_as_well():
    spec = ViewSpec(num_views=2, augmentations=(RandomCrop(size=(40, 44), padding=4),))
    taken = canaries.take(Views(Images(PHOTOS), spec), canaries.choose(0, NUM_IMAGES, 2))
    assert compare(taken, spec=spec).equal
    assert counts(compare(taken, spec=spec.model_copy(update={"seed": 1})))[0] == 32


def test_a_data_set_with_an_image_less_is_told_by_its_fingerprint_and_refused_by_the_cache(tmp_path):
    photos = PHOTOS[:40]
    source = TeacherSource(preprocessing=Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3))
    recipe = PrecomputeRecipe(cache=str(tmp_path / "cache.zarr"), views=SPEC, teachers={"mean": source}, num_workers=0)
    teacher = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    precompute(recipe, teachers={"mean": teacher}, dataset=Images(photos))
    cache = open_cache(tmp_path / "cache.zarr")
    assert cache.views(Images(list(photos))).dataset.labels.shape == (40,)
    assert fingerprint(Images(photos[:-1])) != fingerprint(Images(photos))
    with pytest.raises(MismatchError, match="39"):
        cache.views(Images(photos[:-1]))
    for images in (photos[1:] + photos[:1], [*photos[:-1], photos[-1] ^ 1], [image.flip(0) for image in photos]):
        with pytest.raises(MismatchError):
            cache.views(Images(images), verify="numeric")
