"""Epochs: every image once, in an order that is a function of seed and epoch."""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributed
from torch.utils.data import DataLoader

from logitcache.errors import RecipeError
from logitcache.targets import Batch, Targets
from logitcache.views.augmentations import HorizontalFlip
from logitcache.views.epochs import EpochLoader
from logitcache.views.keys import ViewKey, order_words, permutation
from logitcache.views.order import EpochOrder, share_of
from logitcache.views.spec import Views, ViewSpec
from tests.views.images import Images, textured

counts = st.integers(1, 400)
blocks = st.none() | st.integers(1, 450)
words64 = st.integers(0, 2**64 - 1)


@pytest.fixture(scope="module")
def views() -> Views:
    return Views(Images(textured(23, 6, 6)), ViewSpec(num_views=3, augmentations=(HorizontalFlip(),)))


def epoch_order(count: int, seed: int, epoch: int, block: int | None = None, unit: int = 1) -> np.ndarray:
    return EpochOrder(count, seed, epoch, block, unit)[:]


def rows(batch: Batch) -> list[tuple[list[int], list[int]]]:
    return list(zip(batch.keys.tolist(), batch.images.tolist(), strict=True))


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


def by_definition(count: int, seed: int, block: int) -> list[int]:
    """Sort the places of epoch 1 by the rank of their run, and in it by their words."""
    runs = permutation(seed ^ 1, 1, -(-count // block)).tolist() if block < count else [0]
    words = order_words(seed, 1, np.arange(count)).tolist()
    return sorted(range(count), key=lambda place: (runs.index(place // min(block, count)), words[place], place))


@given(count=counts, seed=words64, block=st.integers(1, 450), cuts=st.lists(st.integers(0, 400), max_size=6))
def test_slices_of_an_order_are_those_of_the_whole_in_whatever_turn_they_are_drawn(count, seed, block, cuts):
    whole, order = by_definition(count, seed, block), EpochOrder(count, seed, 1, block)
    for start, stop in itertools.pairwise([0, *cuts, count]):
        assert order[start:stop].tolist() == whole[start:stop]


@given(count=counts, seed=words64, block=blocks.map(lambda block: block and 3 * block), cut=st.integers(0, 400))
def test_slices_may_cut_units(count, seed, block, cut):
    order, again = (EpochOrder(count, seed, 1, block, unit=3) for _ in range(2))
    assert [*order[:cut], *order[cut:]] == again[:].tolist()


def test_a_slice_of_a_thousand_million_places_is_drawn_alone():
    found = EpochOrder(10**9, 5, 2, block=1 << 14)[500_000_000:500_040_000]
    assert len(set(found.tolist())) == 40_000
    assert len(set((found >> 14).tolist())) in (3, 4)


def test_without_a_block_all_images_are_shuffled_together():
    for block in (None, 50, 51):
        assert np.array_equal(epoch_order(50, 9, 2, block), permutation(9, 2, 50))


@given(count=counts, seed=words64, block=blocks.map(lambda block: block and 3 * block))
def test_places_of_a_unit_stay_together(count, seed, block):
    order = epoch_order(count, seed, 1, block, unit=3)
    assert sorted(order.tolist()) == list(range(count))
    whole = count - count % 3
    assert order[whole:].tolist() == list(range(whole, count))
    assert all(unit.tolist() == [unit[0], unit[0] + 1, unit[0] + 2] for unit in order[:whole].reshape(-1, 3))
    if block is not None and block < count:
        runs = [number for number, _ in itertools.groupby((order[:whole] // block).tolist())]
        assert len(runs) == len(set(runs))


@given(count=counts, world_size=st.integers(1, 9), unit=st.integers(1, 3))
def test_processes_share_a_batch_without_overlap_and_evenly(count, world_size, unit):
    parts = [share_of(range(count), rank, world_size, unit) for rank in range(world_size)]
    assert [item for part in parts for item in part] == list(range(count))
    sizes = [-(-len(part) // unit) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert not any(part and part[0] % unit for part in parts)


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


@pytest.mark.parametrize("shared", [2, 3, 4])
@pytest.mark.parametrize("count", [5, 12, 23])
def test_epochs_of_several_views_per_image_take_every_view_once_in_as_many_epochs(shared, count):
    views = Views(Images(textured(count, 6, 6)), ViewSpec(num_views=4 * shared))
    loader = EpochLoader(views, batch_size=12, views_per_image=shared)
    for group in range(3):
        epochs = [
            [ViewKey(*key) for batch in loader.epoch(group * shared + part) for key in batch.keys.tolist()]
            for part in range(shared)
        ]
        assert [len(keys) for keys in epochs] == [count] * shared
        together = list(itertools.chain.from_iterable(epochs))
        wanted = [ViewKey(group * shared + part, index) for part in range(shared) for index in range(count)]
        assert sorted(together) == wanted
        images = [index for index, _ in itertools.groupby(key.index for key in together)]
        assert len(images) == count, "the views of an image follow one another"


def test_several_views_of_an_image_are_decoded_once():
    class Counting(Images):
        reads = 0

        def read(self, index):
            Counting.reads += 1
            return super().read(index)

    views = Views(Counting(textured(16, 6, 6)), ViewSpec(num_views=4, augmentations=(HorizontalFlip(),)))
    found = {}
    for shared, reads in ((1, 64), (4, 16)):
        Counting.reads = 0
        loader = EpochLoader(views, batch_size=8, views_per_image=shared)
        batches = [batch for epoch in range(4) for batch in loader.epoch(epoch)]
        assert Counting.reads == reads
        found[shared] = {tuple(key): image for batch in batches for key, image in rows(batch)}
    assert found[1] == found[4]


@pytest.mark.parametrize(
    ("mixing", "options", "text"),
    [
        ([], {"views_per_image": 4, "batch_size": 6}, "would cut the views of an image apart.*such as 4"),
        ([{"kind": "mixup"}], {"batch_size": 7}, "would cut pairs that are mixed apart.*such as 6"),
        ([], {"views_per_image": 0}, "views_per_image is 0"),
        ([], {"rank": 2, "world_size": 2}, "rank 2 is not one of 2 processes"),
        ([], {"batch_size": 22, "world_size": 2}, "a batch of 1 images has no part for each of 2 processes"),
        ([{"kind": "mixup"}], {"batch_size": 20, "world_size": 3}, "a batch of 3 images has no part"),
    ],
)
def test_batches_that_cannot_be_shared_are_refused(mixing, options, text):
    spec = ViewSpec.model_validate_json(json.dumps({"num_views": 4, "mixing": mixing}))
    with pytest.raises(RecipeError, match=text):
        EpochLoader(Views(Images(textured(23, 6, 6)), spec), **options)


@pytest.mark.parametrize(
    ("spec", "shared", "text"),
    [
        ({"num_views": 3}, 4, "views_per_image is 4, but there are 3 views"),
        ({"num_views": 4, "mixing": [{"kind": "mixup"}]}, 2, "with mixing each view brings another partner"),
    ],
)
def test_views_that_cannot_share_a_decode_are_refused(spec, shared, text):
    views = Views(Images(textured(8, 6, 6)), ViewSpec.model_validate_json(json.dumps(spec)))
    with pytest.raises(RecipeError, match=text):
        EpochLoader(views, views_per_image=shared)


@pytest.mark.parametrize(("mixing", "shared"), [([], 1), ([], 2), ([{"kind": "cutmix"}], 1)])
def test_any_number_of_processes_renders_the_same_epoch(mixing, shared):
    spec = ViewSpec.model_validate_json(json.dumps({"num_views": 4, "mixing": mixing}))
    views = Views(Images(textured(23, 6, 6)), spec)

    def seen(rank: int, world_size: int) -> list[tuple[list[int], list[int]]]:
        loader = EpochLoader(views, batch_size=12, views_per_image=shared, rank=rank, world_size=world_size)
        batches = (batch for batch in loader.epoch(3))
        return [(key, image) for batch in batches for key, image in rows(batch)]

    alone = sorted(seen(0, 1))
    for world_size in (2, 3):
        parts = [seen(rank, world_size) for rank in range(world_size)]
        assert sorted(itertools.chain.from_iterable(parts)) == alone
        for part in parts if mixing else []:
            indices = np.array([key[1] for key, _ in part])
            partners = views.spec.partners(23, 23).partners(np.full_like(indices, 3), indices)
            assert set(partners) == set(indices), "no pair is split"


@pytest.mark.parametrize("block", [None, 8])
def test_windows_that_are_decoded_together_hold_whole_pairs(block):
    spec = ViewSpec.model_validate_json(json.dumps({"mixing": [{"kind": "mixup"}], "pairing_window": 4}))
    loader = EpochLoader(Views(Images(textured(30, 6, 6)), spec), batch_size=2, shuffle_block=block)
    keys = list(loader.keys(0))
    assert sorted(key.index for batch in keys for key in batch) == list(range(30))
    assert all(len({key.index // 4 for key in batch}) == 1 for batch in keys)
    if block is not None:
        blocks = [number for number, _ in itertools.groupby(batch[0].index // 8 for batch in keys)]
        assert len(blocks) == len(set(blocks))


def test_a_loader_reads_the_epoch_that_was_set_and_counts_no_passes(views):
    loader = EpochLoader(views, batch_size=5, seed=2)
    for epoch in (0, 4, 1):
        for choose in (loader.set_epoch, loader.sampler.set_epoch, loader.batch_sampler.set_epoch):
            choose(epoch)
            assert list(loader.sampler) == list(loader.keys(epoch))
            assert [rows(batch) for batch in loader] == [rows(batch) for batch in loader.epoch(epoch)]
    assert len(loader.sampler) == len(loader) == 5


def test_epochs_by_number_leave_the_current_one_alone(views):
    loader = EpochLoader(views, batch_size=5)
    list(loader.epoch(7))
    assert {key.view for keys in loader.sampler for key in keys} == {0}
    assert {key for batch in loader for key in batch.keys[:, 0].tolist()} == {0}


@pytest.mark.parametrize("batch_size", [5, 23])
def test_a_second_pass_over_one_of_several_views_warns_and_the_fix_helps(views, batch_size):
    loader = EpochLoader(views, batch_size=batch_size)
    next(iter(loader))
    assert len(list(loader)) == len(loader), "a look at the first batch is no pass"
    for _ in range(2):
        with pytest.warns(
            UserWarning, match=r"epoch 0 is read again: of 3 views.*Fix: loader\.set_epoch\(epoch\) before"
        ):
            assert [rows(batch) for batch in loader] == [rows(batch) for batch in loader.epoch(0)]
    loader.set_epoch(1)
    list(loader)
    loader.set_epoch(1)
    list(loader)
    list(loader.epoch(1))


def test_one_view_may_be_read_again():
    loader = EpochLoader(Views(Images(textured(7, 6, 6)), ViewSpec()), batch_size=3)
    assert [rows(batch) for batch in loader] == [rows(batch) for batch in loader]


def test_the_sampler_feeds_a_loader_of_torch(views):
    loader = EpochLoader(views, batch_size=4)
    loader.set_epoch(2)
    images = DataLoader(views, batch_sampler=loader.sampler, collate_fn=lambda rendered: rendered)
    for rendered, batch in zip(images, loader, strict=True):
        assert torch.equal(rendered, batch.images)


def test_processes_of_torch_take_their_parts_by_default(views, tmp_path):
    loader = EpochLoader(views, batch_size=12)
    whole = list(loader.keys(1))
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        assert list(loader.keys(1)) == whole
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(distributed, "get_world_size", lambda: 2)
            parts = []
            for rank in range(2):
                patch.setattr(distributed, "get_rank", lambda rank=rank: rank)
                parts.append(list(loader.keys(1)))
            assert [first + second for first, second in zip(*parts, strict=True)] == whole
            assert list(EpochLoader(views, batch_size=12, rank=0, world_size=1).keys(1)) == whole
            patch.setattr(distributed, "get_world_size", lambda: 13)
            with pytest.raises(RecipeError, match="no part for each of 13 processes"):
                next(loader.keys(1))
    finally:
        distributed.destroy_process_group()
