"""Canaries: which views they are, what is compared, and what a message says."""

from collections import Counter
from typing import Any

import pytest
from pydantic import ValidationError

from logitcache.errors import DataError, ReplayMismatchError
from logitcache.views import canaries
from logitcache.views.augmentations import HorizontalFlip, RandomCrop
from logitcache.views.canaries import CanaryReport, DriftLimits, Origin
from logitcache.views.keys import ViewKey
from logitcache.views.mixing.mixing import CutMix, MixUp
from logitcache.views.spec import Views, ViewSpec
from tests.views.images import Images, textured

NUM_IMAGES = 60
PHOTOS = textured(NUM_IMAGES, 40, 44)
ORIGIN = Origin(
    "caches/c100.zarr, spec 91c0…",
    {"torch": "2.14.1", "cpu": "x86_64 AVX512"},
    {"torch": "2.14.1", "cpu": "x86_64 AVX512"},
)


@pytest.mark.parametrize(
    "entry", [{"mean": -0.1}, {"mean": 256.0}, {"max": -1}, {"max": 256}, {"max": 1.5}, {"min": 0}]
)
def test_limits_outside_the_levels_are_refused(entry: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DriftLimits(**entry)


DRIFT = CanaryReport(32, 32, 32, 0, 0.2312, 7)


def test_the_message_tells_counts_verdict_versions_and_fix() -> None:
    origin = ORIGIN._replace(here={"torch": "2.14.1", "cpu": "x86_64 DEFAULT"})
    with pytest.raises(ReplayMismatchError) as refused:
        canaries.judge(DRIFT, "strict", origin)
    lines = [
        "augmented images differ from those the teacher saw (caches/c100.zarr, spec 91c0…)",
        "  raw images 32/32 equal | plans 32/32 equal | augmented 0/32 equal: mean |d| 0.23, max 7",
        "  -> numeric drift (limits 0.5 / 16): same crops, different kernels.",
        "  recorded: cpu x86_64 AVX512      here: cpu x86_64 DEFAULT",
    ]
    fix = "  Fix: accept with --verify numeric, or precompute again on this machine."
    assert str(refused.value).splitlines() == [*lines, fix]
    assert str(canaries.judge(DRIFT, "numeric", origin)).splitlines() == [*lines, "  Accepted, as verify is numeric."]
    assert canaries.judge(DRIFT, "off", origin) is None


@pytest.mark.parametrize(
    ("recorded", "here", "line"),
    [
        ({}, {}, "recorded: torch 2, cpu x86      here: torch 2, cpu x86"),
        ({"torch": "1"}, {}, "recorded: torch 1      here: torch 2"),
        ({"zarr": "3"}, {"numpy": "2"}, "recorded: zarr 3, numpy none      here: zarr none, numpy 2"),
    ],
)
def test_only_versions_that_differ_are_told_or_what_decides_pixels(
    recorded: dict[str, str], here: dict[str, str], line: str
) -> None:
    both = {"torch": "2", "cpu": "x86", "python": "3.11"}
    message = canaries.judge(DRIFT, "numeric", Origin("c", both | recorded, both | here))
    assert message is not None
    assert f"\n  {line}\n" in message


def test_plans_that_are_recorded_may_be_replayed() -> None:
    report = CanaryReport(32, 32, 3, 3, 40.0, 255)
    for has_parameters in (False, True):
        with pytest.raises(ReplayMismatchError) as refused:
            canaries.judge(report, "numeric", ORIGIN._replace(has_parameters=has_parameters))
        assert ("replay: recorded" in str(refused.value)) == has_parameters


def test_images_that_have_grown_apart_are_a_mismatch_too() -> None:
    plain = ViewSpec(augmentations=(HorizontalFlip(),))
    keys = [ViewKey(0, index) for index in range(32)]
    taken = canaries.take(Views(Images(PHOTOS), plain), keys)
    grown = [*PHOTOS[:5], *textured(1, 41, 44), *PHOTOS[6:]]
    found = canaries.compare(Views(Images(grown), plain), *taken)
    assert (found.raw_equal, found.plans_equal, found.augmented_equal, found.max_difference) == (31, 32, 31, 255)
    with pytest.raises(ReplayMismatchError, match="the decoded images differ"):
        canaries.judge(found, "numeric", ORIGIN)


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


def test_a_random_crop_is_checked_as_well() -> None:
    spec = ViewSpec(num_views=2, augmentations=(RandomCrop(size=(40, 44), padding=4),))
    taken = canaries.take(Views(Images(PHOTOS), spec), canaries.choose(0, NUM_IMAGES, 2))
    assert canaries.compare(Views(Images(PHOTOS), spec), *taken).equal
    other = canaries.compare(Views(Images(PHOTOS), spec.model_copy(update={"seed": 1})), *taken)
    assert (other.raw_equal, other.plans_equal < 32) == (32, True)


MIXED = ViewSpec(num_views=2, augmentations=(HorizontalFlip(),), mixing=(MixUp(p=0.5), CutMix(p=0.5)))


@pytest.mark.parametrize(
    "changes",
    [
        {"mixing": (MixUp(p=0.5, alpha=0.2), CutMix(p=0.5))},
        {"mixing": (MixUp(),)},
        {"mixing": ()},
        {"pairing_window": 8},
    ],
    ids=["alpha", "kinds", "none", "window"],
)
def test_the_plan_of_a_mixed_view_holds_partner_weight_and_box(changes: dict[str, Any]) -> None:
    taken = canaries.take(Views(Images(PHOTOS), MIXED), canaries.choose(0, NUM_IMAGES, 2))
    assert canaries.compare(Views(Images(PHOTOS), MIXED), *taken).equal
    other = canaries.compare(Views(Images(PHOTOS), MIXED.model_copy(update=changes)), *taken)
    assert other.raw_equal == 32
    assert other.plans_equal <= other.augmented_equal < 24


def test_the_number_of_images_decides_partners_and_so_the_plans() -> None:
    keys = [ViewKey(view, index) for view in range(2) for index in range(16)]
    taken = canaries.take(Views(Images(PHOTOS), MIXED), keys)
    fewer = canaries.compare(Views(Images(PHOTOS[:-1]), MIXED), *taken)
    assert (fewer.raw_equal, fewer.plans_equal < 32) == (32, True)
