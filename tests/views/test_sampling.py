"""Sampling by class: frequencies, and orders that depend on nothing but labels, seed and epoch."""

import itertools
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from logitcache.errors import RecipeError
from logitcache.views.augmentations import HorizontalFlip
from logitcache.views.epochs import EpochLoader
from logitcache.views.mixing.mixing import MixUp
from logitcache.views.sampling import ClassBalanced, EffectiveNumber, EveryImage, occurrences
from logitcache.views.spec import Views, ViewSpec
from tests.views.images import Images, textured

COUNTS = (400, 90, 7, 3)
BY_CLASS = [ClassBalanced(), EffectiveNumber(beta=0.99)]


@dataclass
class Labelled(Images):
    """Images with labels of one's own; they lie in no order of classes."""

    given: tuple[int, ...] = ()

    num_classes = 5

    @property
    def labels(self) -> NDArray[np.int64]:
        return np.array(self.given, dtype=np.int64)


def long_tailed() -> Labelled:
    labels = [label for label, count in enumerate(COUNTS) for _ in range(count)]
    shuffled = np.random.default_rng(0).permutation(labels).tolist()
    return Labelled(textured(1, 4, 4) * len(labels), given=tuple(shuffled))


@pytest.fixture(scope="module")
def images() -> Labelled:
    return long_tailed()


def drawn(sampling: ClassBalanced | EffectiveNumber, images: Labelled, epochs: int = 40) -> NDArray[np.int64]:
    return np.concatenate([sampling.order(images.labels, 11, epoch, None, 1)[0] for epoch in range(epochs)])


def as_expected(found: NDArray[np.int64], shares: list[float]) -> None:
    expected = np.array(shares) / np.sum(shares) * len(found)
    counts = np.bincount(found, minlength=len(shares))
    assert stats.chisquare(counts, expected).pvalue > 1e-4


def test_classes_are_drawn_equally_often_and_so_are_the_images_of_each(images):
    found = drawn(ClassBalanced(), images)
    as_expected(images.labels[found], [1.0] * 4)
    for label in range(4):
        members = np.flatnonzero(images.labels == label)
        chosen = found[images.labels[found] == label]
        as_expected(np.searchsorted(members, chosen), [1.0] * len(members))


@pytest.mark.parametrize("beta", [0.9, 0.99, 0.9999])
def test_images_are_drawn_by_the_effective_number_of_their_class(images, beta):
    found = drawn(EffectiveNumber(beta=beta), images)
    as_expected(images.labels[found], [n * (1 - beta) / (1 - beta**n) for n in COUNTS])


def test_effective_numbers_go_from_the_images_own_frequencies_to_balance():
    low, high = (EffectiveNumber(beta=beta).shares(list(COUNTS)) for beta in (1e-9, 1 - 1e-12))
    assert [float(share) for share in low] == pytest.approx(COUNTS)
    assert [float(share) for share in high] == pytest.approx([1.0] * 4)


@pytest.mark.parametrize("sampling", BY_CLASS, ids=lambda sampling: sampling.kind)
@given(seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 2**32 - 1))
def test_an_epoch_draws_as_many_images_as_there_are_and_the_same_again(sampling, seed, epoch):
    images = Labelled(textured(1, 4, 4) * 60, given=(4, 0, 0) * 20)
    order, repeats = sampling.order(images.labels, seed, epoch, None, 1)
    again = sampling.order(images.labels, seed, epoch, None, 1)
    assert order.shape == repeats.shape == (60,)
    assert set(order.tolist()) <= set(range(60))
    assert np.array_equal(order, again[0])
    assert np.array_equal(repeats, again[1])


def test_orders_depend_on_both_halves_of_the_seed_and_on_the_epoch(images):
    arguments = itertools.product((0, 1, 2**32, 2**63), (0, 1, 2))
    orders = {
        tuple(ClassBalanced().order(images.labels, seed, epoch, None, 1)[0].tolist()) for seed, epoch in arguments
    }
    assert len(orders) == 12


def test_draws_of_a_block_follow_one_another(images):
    plain, _ = ClassBalanced().order(images.labels, 3, 5, None, 1)
    blocked, repeats = ClassBalanced().order(images.labels, 3, 5, 100, 1)
    assert Counter(plain.tolist()) == Counter(blocked.tolist())
    runs = [number for number, _ in itertools.groupby((blocked // 100).tolist())]
    assert len(runs) == len(set(runs)) == 5
    assert np.array_equal(repeats, occurrences(blocked))


@given(st.lists(st.integers(0, 6), min_size=1, max_size=60))
def test_occurrences_count_what_came_before(values):
    found = occurrences(np.array(values, dtype=np.int64))
    assert found.tolist() == [values[:place].count(value) for place, value in enumerate(values)]


def test_an_image_that_comes_again_does_so_in_the_next_views(images):
    views = Views(images, ViewSpec(num_views=3, augmentations=(HorizontalFlip(),)))
    loader = EpochLoader(views, batch_size=500, sampling=ClassBalanced())
    seen: dict[int, list[int]] = {}
    for key in itertools.chain.from_iterable(loader.keys(4)):
        seen.setdefault(key.index, []).append(key.view)
    assert max(map(len, seen.values())) > 3
    for found in seen.values():
        assert found == [(4 + number) % 3 for number in range(len(found))]


def test_views_that_share_a_decode_stay_together(images):
    views = Views(images, ViewSpec(num_views=4, augmentations=(HorizontalFlip(),)))
    loader = EpochLoader(views, batch_size=100, views_per_image=2, sampling=ClassBalanced())
    keys = [key for epoch in (0, 1) for key in itertools.chain.from_iterable(loader.keys(epoch))]
    assert len(keys) == 1000
    for first, second in zip(keys[::2], keys[1::2], strict=True):
        assert first.index == second.index
        assert (second.view - first.view) % 4 == 1


def test_resuming_and_the_number_of_processes_change_nothing(images):
    views = Views(images, ViewSpec(num_views=2, augmentations=(HorizontalFlip(),)))

    def batches(rank: int = 0, world_size: int = 1) -> list[list[tuple[int, int]]]:
        loader = EpochLoader(views, batch_size=64, sampling=ClassBalanced(), rank=rank, world_size=world_size)
        return [[tuple(key) for key in keys] for keys in loader.keys(2)]

    alone = batches()
    parts = [batches(rank, 3) for rank in range(3)]
    assert [list(itertools.chain(*shares)) for shares in zip(*parts, strict=True)] == alone
    loader = EpochLoader(views, batch_size=64, sampling=ClassBalanced())
    assert [list(map(tuple, batch.keys.tolist())) for batch in loader.epoch(2, 3)] == alone[3:]


def test_every_image_is_the_default_and_draws_none_twice(images):
    views = Views(images, ViewSpec())
    keys = list(itertools.chain.from_iterable(EpochLoader(views, batch_size=64).keys(1)))
    assert keys == list(itertools.chain.from_iterable(EpochLoader(views, batch_size=64, sampling=EveryImage()).keys(1)))
    assert len(set(keys)) == 500


def test_images_without_labels_are_refused():
    images = Labelled(textured(4, 4, 4), given=(0, -1, 1, -1))
    with pytest.raises(RecipeError, match="2 of 4 have none"):
        EpochLoader(Views(images, ViewSpec()), batch_size=2, sampling=ClassBalanced())


def test_images_that_are_mixed_are_refused(images):
    views = Views(images, ViewSpec(mixing=(MixUp(),)))
    with pytest.raises(RecipeError, match="logit_adjustment"):
        EpochLoader(views, batch_size=2, sampling=ClassBalanced())
