"""Epochs: every image once, in an order that is a function of seed and epoch."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from logitcache.errors import RecipeError
from logitcache.targets import Targets
from logitcache.views.augmentations import HorizontalFlip
from logitcache.views.epochs import EpochLoader
from logitcache.views.keys import ViewKey, permutation
from logitcache.views.order import epoch_order
from logitcache.views.spec import Views, ViewSpec
from tests.views.images import Images, textured

counts = st.integers(1, 400)
blocks = st.none() | st.integers(1, 450)
words64 = st.integers(0, 2**64 - 1)


@pytest.fixture(scope="module")
def views() -> Views:
    return Views(Images(textured(23, 6, 6)), ViewSpec(num_views=3, augmentations=(HorizontalFlip(),)))


@given(count=counts, seed=words64, epoch=st.integers(0, 2**32 - 1), block=blocks)
def test_every_image_is_in_the_order_once(count, seed, epoch, block):
    order = epoch_order(count, seed, epoch, block)
    assert sorted(order.tolist()) == list(range(count))
    assert np.array_equal(order, epoch_order(count, seed, epoch, block))


@given(count=counts, seed=words64, block=st.integers(1, 400))
def test_images_of_a_block_follow_one_another(count, seed, block):
    order = epoch_order(count, seed, 0, min(block, count))
    runs = [number for number, _ in itertools.groupby((order // min(block, count)).tolist())]
    assert len(runs) == len(set(runs)) == -(-count // min(block, count))


def test_blocks_and_the_images_in_them_are_shuffled_anew_each_epoch():
    orders = [epoch_order(120, 3, epoch, 10).reshape(12, 10) for epoch in range(4)]
    assert len({tuple((order[:, 0] // 10).tolist()) for order in orders}) == 4
    within = [order[order[:, 0] // 10 == 5].tolist() for order in orders]
    assert len({tuple(row[0]) for row in within}) == 4


def test_without_a_block_all_images_are_shuffled_together():
    for block in (None, 50, 51):
        assert np.array_equal(epoch_order(50, 9, 2, block), permutation(9, 2, 50))


def test_order_depends_on_both_halves_of_the_seed_and_on_the_epoch():
    arguments = itertools.product((0, 1, 2**32, 2**63), (0, 1, 2))
    orders = {tuple(epoch_order(40, seed, epoch, 8).tolist()) for seed, epoch in arguments}
    assert len(orders) == 12


@pytest.mark.parametrize(("batch_size", "drop_last", "sizes"), [(5, False, [5] * 4 + [3]), (5, True, [5] * 4)])
def test_an_epoch_has_every_image_once_but_those_of_a_dropped_batch(views, batch_size, drop_last, sizes):
    loader = EpochLoader(views, batch_size=batch_size, drop_last=drop_last, shuffle_block=4)
    batches = list(loader.epoch(1))
    assert [len(batch) for batch in batches] == sizes
    assert len(loader) == len(sizes)
    assert loader.images_per_epoch == sum(sizes)
    found = [key[1] for batch in batches for key in batch.keys.tolist()]
    assert len(set(found)) == sum(sizes)
    assert found == epoch_order(23, 0, 1, 4).tolist()[: sum(sizes)]


def test_a_batch_holds_what_belongs_to_its_keys(views):
    def targets_of(keys):
        return {"teacher": Targets(torch.tensor([[view, index] for view, index in keys]))}

    loader = EpochLoader(views, targets_of, batch_size=4, seed=1)
    for epoch in range(7):
        for batch in loader.epoch(epoch):
            assert set(batch.keys[:, 0].tolist()) == {epoch % 3}
            assert torch.equal(batch.labels, batch.keys[:, 1] % 3)
            assert torch.equal(batch.targets.logits, batch.keys)
            keys = [ViewKey(*key) for key in batch.keys.tolist()]
            assert torch.equal(batch.images, views.__getitems__(keys))


def test_the_last_batch_may_be_the_whole_epoch(views):
    [batch] = EpochLoader(views, batch_size=1000).epoch(0)
    assert sorted(batch.keys[:, 1].tolist()) == list(range(23))


@pytest.mark.parametrize("drop_last", [False, True])
def test_start_continues_where_the_epoch_was(views, drop_last):
    def seen(batches):
        return [(batch.keys.tolist(), batch.images.tolist()) for batch in batches]

    loader = EpochLoader(views, batch_size=4, drop_last=drop_last, seed=8)
    whole = seen(loader.epoch(2))
    for start in range(len(loader) + 1):
        assert seen(loader.epoch(2, start)) == whole[start:]


def test_a_sampler_of_the_callers_own_is_followed(views):
    batches = [[ViewKey(2, 4)], [ViewKey(0, 4), ViewKey(1, 7)], [ViewKey(2, 4)]]
    loader = EpochLoader(views)
    for given_batches in (batches, iter(batches)):
        found = [batch.keys.tolist() for batch in loader.batches(given_batches)]
        assert found == [[list(key) for key in keys] for keys in batches]


def test_keys_are_taken_from_a_sampler_no_further_than_they_are_rendered(views):
    endless = ([ViewKey(0, number % 23)] for number in itertools.count())
    batches = EpochLoader(views).batches(endless)
    assert [batch.keys.tolist() for batch in itertools.islice(batches, 3)] == [[[0, 0]], [[0, 1]], [[0, 2]]]


def test_dropping_the_only_batch_is_refused(views):
    with pytest.raises(RecipeError, match="23 images are fewer than batch_size 24"):
        EpochLoader(views, batch_size=24, drop_last=True)
    assert len(EpochLoader(views, batch_size=23, drop_last=True)) == 1


@pytest.mark.parametrize("keys", [[], [ViewKey(0, 99)], [ViewKey(2, 0)], [ViewKey(-1, 0)], [ViewKey(0, -1)]])
def test_keys_that_name_no_view_are_refused_before_anything_is_rendered(keys):
    rendered = []

    class Watched(Views):
        def __getitems__(self, keys):
            rendered.append(keys)
            return super().__getitems__(keys)

    loader = EpochLoader(Watched(Images(textured(5, 6, 6)), ViewSpec(num_views=2)))
    with pytest.raises(IndexError):
        list(loader.batches([keys]))
    assert not rendered
