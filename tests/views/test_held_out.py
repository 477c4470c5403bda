"""Images that are held out: a share of them, by index alone, and never in an epoch."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from logitcache.errors import RecipeError
from logitcache.views.augmentations import HorizontalFlip
from logitcache.views.epochs import EpochLoader
from logitcache.views.keys import Draws
from logitcache.views.mixing.mixing import MixUp
from logitcache.views.order import held_out
from logitcache.views.sampling import ClassBalanced, EveryImage
from logitcache.views.spec import Views, ViewSpec
from tests.views.images import Images, textured


@given(st.integers(0, 3000), st.integers(0, 3000), st.floats(0.001, 0.999))
def test_whether_an_image_is_held_out_depends_on_its_index_alone(count: int, more: int, share: float) -> None:
    assert np.array_equal(held_out(count + more, share)[:count], held_out(count, share))


@given(st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_a_larger_share_holds_out_the_same_and_more(one: float, other: float) -> None:
    small, large = (held_out(500, share) for share in sorted((one, other)))
    assert not (small & ~large).any()


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_as_many_are_held_out_as_the_share_says(share: float) -> None:
    held = held_out(100_000, share)
    assert stats.binomtest(int(held.sum()), 100_000, share).pvalue > 1e-4
    every = np.arange(100_000, dtype=np.uint64)
    words = Draws(0, np.zeros_like(every), every).words("held_out", 0, 1)[:, 0]
    assert np.array_equal(held, words < share * 2**32)


@given(
    chosen=st.sets(st.integers(0, 39), min_size=6),
    views_per_image=st.sampled_from([1, 2]),
    block=st.sampled_from([None, 4, 16]),
    world_size=st.sampled_from([1, 2]),
    balanced=st.booleans(),
)
def test_epochs_read_the_chosen_images_and_no_others(
    chosen: set[int], views_per_image: int, block: int | None, world_size: int, balanced: bool
) -> None:
    spec = ViewSpec(num_views=2, augmentations=(HorizontalFlip(),))
    views = Views(Images(textured(1, 2, 2) * 40), spec)
    found = []
    for rank in range(world_size):
        loader = EpochLoader(
            views,
            batch_size=2 * world_size,
            views_per_image=views_per_image,
            sampling=ClassBalanced() if balanced else EveryImage(),
            images=np.array(sorted(chosen)),
            shuffle_block=block,
            drop_last=len(chosen) % (2 * world_size) != 0,
            rank=rank,
            world_size=world_size,
        )
        found += [key for epoch in range(2) for batch in loader.keys(epoch) for key in batch]
        assert loader.images_per_epoch == len(chosen) - len(chosen) % (2 * world_size)
    assert {index for _, index in found} <= chosen
    if not balanced and len(chosen) % (2 * world_size) == 0:
        assert sorted(found) == [(view, index) for view in (0, 1) for index in sorted(chosen)]


def test_images_that_are_mixed_cannot_be_held_out() -> None:
    views = Views(Images(textured(1, 2, 2) * 40), ViewSpec(mixing=(MixUp(),)))
    with pytest.raises(RecipeError, match=r"partners of one another.*Fix: leave out validation\.split"):
        EpochLoader(views, batch_size=2, images=np.arange(10))
