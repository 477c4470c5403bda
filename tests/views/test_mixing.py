"""Mixing: what torchvision's MixUp and CutMix do to a pair, with integers, for any batch."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy import special, stats
from torchvision.transforms import v2

from logitcache.views.epochs import EpochLoader
from logitcache.views.keys import ViewKey
from logitcache.views.mixing.mixing import CutMix, Mixture, MixUp, PlanVersion, beta_thresholds
from logitcache.views.spec import Views, ViewSpec
from tests.views.images import Images, textured

MIXUP: dict[str, Any] = {"kind": "mixup"}
CUTMIX: dict[str, Any] = {"kind": "cutmix"}
SOMETIMES = [{"kind": "mixup", "alpha": 0.2, "p": 0.4}, {"kind": "cutmix", "p": 0.3}]


def spec_of(*mixing: dict[str, Any], **entries: Any) -> ViewSpec:
    return ViewSpec.model_validate_json(json.dumps({"num_views": 4, "mixing": mixing, **entries}))


def keys_of(count: int, view: int = 1) -> list[ViewKey]:
    return [ViewKey(view, index) for index in range(count)]


def mixed(spec: ViewSpec, count: int, size: tuple[int, int] = (32, 32), view: int = 1) -> Mixture:
    mixture = spec.mixture(keys_of(count, view), spec.partners(count, count), size)
    assert mixture is not None
    return mixture


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.3, 0.8, 1.0, 1.5, 2.0, 7.3, 64.0])
def test_thresholds_are_the_beta_distribution_of_scipy(alpha):
    expected = special.betainc(alpha, alpha, (2 * np.arange(256) + 1) / 512) * 2.0**32
    assert np.abs(np.array(beta_thresholds(alpha)) - expected).max() <= 1.0
    assert all(a <= b for a, b in zip(beta_thresholds(alpha), beta_thresholds(alpha)[1:], strict=False))


@pytest.mark.parametrize("mixing", [[MIXUP], [CUTMIX], SOMETIMES], ids=["mixup", "cutmix", "sometimes"])
@pytest.mark.parametrize("window", [None, 8])
def test_pixels_are_those_of_the_definition(mixing, window):
    """Brute force in int64, image by image."""
    spec = spec_of(*mixing, pairing_window=window, augmentations=[{"kind": "horizontal_flip"}])
    images = Images(textured(41, 19, 23))
    keys = keys_of(41)
    base = Views(images, spec.model_copy(update={"mixing": (), "pairing_window": None})).__getitems__(keys).long()
    views = Views(images, spec)
    found, mixture = views.__getitems__(keys), views.mixture(keys, base.shape[2:])
    assert mixture is not None
    for row in range(41):
        own, partner, weight = base[row], base[mixture.partners[row]], int(mixture.own[row])
        top, left, height, width = mixture.boxes[row].tolist()
        if height and width:
            expected = own.clone()
            expected[:, top : top + height, left : left + width] = partner[:, top : top + height, left : left + width]
        else:
            expected = (own * weight + partner * (256 - weight) + 128) // 256 if mixture.partners[row] != row else own
        assert torch.equal(found[row].long(), expected)


def test_blended_pixels_are_within_half_a_level_of_exact_ones():
    """Every pair of levels with every weight."""
    levels = torch.arange(256, dtype=torch.uint8)
    own = levels[:, None].expand(257, 1, 256, 256).clone()
    partner = levels.expand(257, 1, 256, 256)
    weights = np.arange(257)
    mixture = Mixture(weights + 1000, weights, np.full(257, 256), np.zeros((257, 4), np.int64))
    exact = (
        np.arange(256)[:, None] * (weights / 256)[:, None, None] + np.arange(256) * (1 - weights / 256)[:, None, None]
    )
    found = mixture.apply_(own, partner, weights)
    assert np.abs(found[:, 0].numpy() - exact).max() <= 0.5


@pytest.mark.parametrize("mixing", [[MIXUP], [CUTMIX], SOMETIMES], ids=["mixup", "cutmix", "sometimes"])
def test_a_mixed_view_does_not_depend_on_the_batch_or_its_order(mixing):
    views = Views(Images(textured(30, 17, 12)), spec_of(*mixing))
    keys = [ViewKey(view, index) for view in range(3) for index in range(30)]
    together = views.__getitems__(keys)
    shuffled = np.random.default_rng(0).permutation(len(keys)).tolist()
    again = views.__getitems__([keys[row] for row in shuffled])
    assert torch.equal(again, together[torch.tensor(shuffled)])
    assert all(torch.equal(views[key], together[row]) for row, key in enumerate(keys[::7], 0) for row in [row * 7])


@pytest.mark.parametrize("mixing", [[MIXUP], [CUTMIX], SOMETIMES], ids=["mixup", "cutmix", "sometimes"])
def test_partners_share_weight_and_box(mixing):
    mixture = mixed(spec_of(*mixing), 501)
    partners = mixture.partners
    assert np.array_equal(partners[partners], np.arange(501))
    assert np.array_equal(mixture.own[partners], mixture.own)
    assert np.array_equal(mixture.boxes[partners], mixture.boxes)
    alone = partners == np.arange(501)
    assert (mixture.share[alone] == 1).all()
    assert (mixture.share[~alone] < 1).all()


def test_of_an_odd_number_one_image_stays_as_it_is():
    images = Images(textured(7, 9, 9))
    views = Views(images, spec_of(CUTMIX | {"alpha": 0.05}, MIXUP | {"p": 0.0}))
    [alone] = np.flatnonzero(views.spec.partners(7, 7).partners(np.full(7, 1), np.arange(7)) == np.arange(7))
    assert torch.equal(views[ViewKey(1, int(alone))], images.pixels[int(alone)])


@pytest.mark.parametrize("alpha", [0.2, 1.0, 2.0])
def test_weights_are_distributed_as_lambda_of_torchvision(alpha):
    mixture = mixed(spec_of(MIXUP | {"alpha": alpha}), 8000)
    theirs = v2.MixUp(alpha=alpha, num_classes=2)
    torch.manual_seed(0)
    lam = np.array([theirs.make_params([])["lam"] for _ in range(4000)])
    first = mixture.own[np.arange(8000) < mixture.partners]
    rounded = np.rint(lam * 256)
    assert stats.ks_2samp(first, rounded[rounded < 256]).pvalue > 1e-4


@pytest.mark.parametrize("size", [(32, 32), (40, 96), (224, 224)])
def test_boxes_are_distributed_as_those_of_torchvision(size):
    mixture = mixed(spec_of(CUTMIX, plan_version=1), 8000, size)
    theirs = v2.CutMix(num_classes=2)
    image = torch.empty((1, 3, *size), dtype=torch.uint8)
    torch.manual_seed(0)
    drawn = [theirs.make_params([image]) for _ in range(4000)]
    boxes = np.array([params["box"] for params in drawn])  # left, top, right, bottom
    share = np.array([params["lam_adjusted"] for params in drawn])
    first = np.arange(8000) < mixture.partners
    top, left, height, width = mixture.boxes[first].T
    kept = share < 1
    for ours, yours in zip(
        (left, top, left + width, top + height, mixture.share[first]), (*boxes[kept].T, share[kept]), strict=True
    ):
        assert stats.ks_2samp(ours, yours).pvalue > 1e-4


def boxes_of(alpha: float, size: tuple[int, int], count: int, version: PlanVersion) -> np.ndarray:
    """Heights and widths of boxes before they are clipped."""
    words = (np.arange(count, dtype=np.uint64) * 2 + 1) * np.uint64(2**31 // count)
    return CutMix(alpha=alpha)._sides(words, np.array(size), version)


@pytest.mark.parametrize("alpha", [0.2, 0.5, 1.0, 2.0, 64.0])
@pytest.mark.parametrize("size", [(32, 32), (224, 224), (97, 640)])
def test_boxes_are_exact_in_area(alpha, size):
    """Against scipy's quantiles: sides are those of an exact λ, rounded to pixels; the table is linear in between."""
    count = 4096
    exact = np.sqrt(stats.beta.ppf((np.arange(count) + 0.5) / count, alpha, alpha))[:, None] * size
    found = boxes_of(alpha, size, count, 2)
    assert np.abs(found - exact).max() <= 0.5 + 0.01 * max(size)
    assert (np.abs((found - exact).mean(axis=0)) <= 0.02 + 2e-4 * np.array(size)).all()


def test_small_boxes_are_drawn():
    """By the first plan no side was between 0 and 14 of 224 pixels, and every side was even."""
    heights = {version: set(boxes_of(1.0, (224, 224), 1 << 16, version)[:, 0].tolist()) for version in (1, 2)}
    assert heights[1] <= set(range(14, 225, 2)) | {0}
    assert heights[2] == set(range(1, 225))
    share = np.mean(boxes_of(1.0, (224, 224), 1 << 16, 2)[:, 0] < 14)
    assert share == pytest.approx((13.5 / 224) ** 2, rel=0.01)


def test_new_views_with_cutmix_are_of_the_second_plan_and_others_of_the_first():
    assert spec_of(CUTMIX).plan_version == spec_of(*SOMETIMES).plan_version == 2
    assert spec_of(MIXUP).plan_version == ViewSpec().plan_version == 1
    assert spec_of(CUTMIX, plan_version=1).plan_version == 1
    stored = spec_of(CUTMIX, plan_version=1)
    assert ViewSpec.model_validate_json(stored.model_dump_json()) == stored


@settings(max_examples=50)
@given(height=st.integers(1, 300), width=st.integers(1, 300), view=st.integers(0, 3))
def test_label_weights_are_the_areas(height, width, view):
    mixture = mixed(spec_of(CUTMIX), 40, (height, width), view)
    covered = np.zeros((40, height, width), dtype=bool)
    for row, (top, left, tall, wide) in enumerate(mixture.boxes.tolist()):
        assert 0 <= top <= top + tall <= height
        assert 0 <= left <= left + wide <= width
        covered[row, top : top + tall, left : left + wide] = True
    assert np.array_equal(mixture.own * (height * width), mixture.total * (~covered).sum(axis=(1, 2)))


def test_probabilities_are_kept():
    count = 40_000
    mixture = mixed(spec_of(*SOMETIMES), count)
    boxes = mixture.boxes[:, 2:].all(axis=1)
    blended = ~boxes & (mixture.share < 1)
    # A weight of alpha = 0.2 often rounds to 256, which mixes nothing.
    rounds_to_one = beta_thresholds(0.2)[0] / 2**32
    assert stats.binomtest(int(blended.sum()) // 2, count // 2, 0.4 * (1 - rounds_to_one)).pvalue > 1e-4
    assert 0.28 < boxes.mean() <= 0.31  # few boxes are empty


def test_rows_are_read_back():
    mixture = mixed(spec_of(*SOMETIMES), 50)
    again = Mixture.of_rows(mixture.rows())
    assert all(np.array_equal(a, b) for a, b in zip(mixture, again, strict=True))
    assert mixture.rows().dtype == np.int64


def test_batches_bring_partners_together_with_the_labels_of_both():
    views = Views(Images(textured(22, 6, 6)), spec_of(MIXUP, num_views=2))
    loader = EpochLoader(views, batch_size=4)
    seen = []
    for batch in loader.epoch(1):
        indices = batch.keys[:, 1].numpy()
        mixture = views.mixture([ViewKey(*key) for key in batch.keys.tolist()], batch.images.shape[2:])
        assert mixture is not None
        assert batch.mixed is not None
        assert set(mixture.partners) <= set(indices)
        assert np.array_equal(batch.mixed.partners.numpy(), mixture.partners % 3)
        assert np.array_equal(batch.mixed.share.numpy(), mixture.share.astype(np.float32))
        seen += indices.tolist()
    assert sorted(seen) == list(range(22))


def test_linear_targets_leave_the_teacher_the_images_before_mixing():
    spec = spec_of(MIXUP, targets="linear", pairing_window=8)
    assert spec.answered() == ViewSpec(num_views=4)
    assert spec_of(MIXUP).answered() == spec_of(MIXUP)


@pytest.mark.parametrize(
    ("entries", "text"),
    [
        ({"mixing": [MIXUP | {"p": 0.7}, CUTMIX | {"p": 0.5}]}, "add up to 1.2"),
        ({"pairing_window": 8}, "give `mixing`, or leave them out"),
        ({"targets": "linear"}, "give `mixing`, or leave them out"),
        ({"mixing": [MIXUP], "pairing_window": 7}, "multiple of 2"),
        ({"mixing": [MIXUP | {"alpha": 0.0}]}, "greater than 0"),
        ({"mixing": [MIXUP | {"alpha": 0.5, "thresholds": [*beta_thresholds(0.4)]}]}, "does not belong to `alpha`"),
        ({"mixing": [{"kind": "mixcut"}]}, "mixcut"),
    ],
)
def test_wrong_mixing_is_refused(entries, text):
    with pytest.raises(ValidationError, match=text):
        ViewSpec.model_validate_json(json.dumps(entries))


@pytest.mark.parametrize("kind", [MixUp, CutMix])
def test_the_stored_form_is_read_back(kind):
    mixing = kind(alpha=0.4)
    assert kind.model_validate_json(mixing.model_dump_json()) == mixing
    assert len(mixing.thresholds) == 256
