"""Partners: an involution within windows, looked up without a table, that favours nobody."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from logitcache.views.mixing.partners import Partners

words64 = st.integers(0, 2**64 - 1)
windows = st.integers(1, 200).map(lambda half: 2 * half)


def all_of(count: int, view: int = 0) -> tuple[np.ndarray, np.ndarray]:
    return np.full(count, view), np.arange(count)


@given(seed=words64, count=st.integers(1, 400), window=windows, view=st.integers(0, 2**32 - 1))
def test_partners_are_one_anothers_and_from_one_window(seed, count, window, view):
    views, indices = all_of(count, view)
    paired = Partners(seed, count, window, count)
    partners = paired.partners(views, indices)
    assert np.array_equal(paired.partners(views, partners), indices)
    assert np.array_equal(partners // window, indices // window)
    alone = np.flatnonzero(partners == indices) // window
    odd = [start // window for start in range(0, count, window) if min(window, count - start) % 2]
    assert alone.tolist() == odd


@given(seed=words64, count=st.integers(1, 400), window=windows)
def test_places_are_a_permutation_of_images_and_back(seed, count, window):
    views, indices = all_of(count, 3)
    paired = Partners(seed, count, window, count)
    images = paired.images(views, indices)
    assert sorted(images.tolist()) == list(range(count))
    assert np.array_equal(images // window, indices // window)
    assert np.array_equal(paired.places(views, images), indices)


@given(seed=words64, count=st.integers(2, 400), window=windows)
def test_partners_lie_side_by_side(seed, count, window):
    views, indices = all_of(count)
    paired = Partners(seed, count, window, count)
    places = paired.places(views, indices)
    beside = paired.places(views, paired.partners(views, indices))
    alone = beside == places
    assert np.array_equal(beside[~alone], places[~alone] ^ 1)


@given(seed=words64, keys=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 1_281_166)), min_size=1, max_size=9))
def test_a_partner_does_not_depend_on_the_batch(seed, keys):
    paired = Partners(seed, 1_281_167, 16_384, 1_281_167)
    views, indices = np.array(keys, dtype=np.int64).T
    together = paired.partners(views, indices)
    alone = [int(paired.partners(views[row : row + 1], indices[row : row + 1])[0]) for row in range(len(keys))]
    assert together.tolist() == alone


@pytest.mark.parametrize("count", [3, 4, 5, 6, 10, 16, 17, 64, 100])
@pytest.mark.parametrize("image", [0, 1, -1])
def test_every_other_image_is_a_partner_equally_often(count, image):
    num_views = 200 * count
    views = np.arange(num_views)
    partners = Partners(4, count, count + count % 2, count).partners(views, np.full(num_views, image % count))
    times = np.bincount(partners, minlength=count)
    if count % 2 == 0:
        assert times[image % count] == 0
        times = np.delete(times, image % count)
    assert stats.chisquare(times).pvalue > 1e-4


@pytest.mark.parametrize(("count", "ways"), [(4, 3), (6, 15), (8, 105)])
def test_all_ways_to_pair_are_equally_frequent(count, ways):
    views = np.repeat(np.arange(6000), count)
    partners = Partners(9, count, count, count).partners(views, np.tile(np.arange(count), 6000)).reshape(6000, count)
    _, times = np.unique(partners, axis=0, return_counts=True)
    assert len(times) == ways
    assert stats.chisquare(times).pvalue > 1e-4


def test_views_windows_and_both_halves_of_the_seed_pair_anew():
    def partners(seed: int, view: int, window_number: int) -> tuple[int, ...]:
        start = 50 * window_number
        found = Partners(seed, 200, 50, 200).partners(np.full(50, view), np.arange(start, start + 50))
        return tuple((found - start).tolist())

    arguments = [(0, 0, 0), (1, 0, 0), (2**32, 0, 0), (0, 1, 0), (0, 2**32 - 1, 0), (0, 0, 1), (0, 0, 3)]
    assert len({partners(*each) for each in arguments}) == len(arguments)


def test_large_windows_mix_classes_that_are_sorted():
    """Images of a class lie together, 1,300 each: windows of 64 chunks of 256 hardly pair within a class."""
    indices = np.arange(200_000)
    same = {}
    for window in (256, 64 * 256):
        partners = Partners(0, len(indices), window, len(indices)).partners(np.zeros_like(indices), indices)
        same[window] = float((partners // 1300 == indices // 1300).mean())
    assert same[256] > 0.8
    assert same[64 * 256] < 0.1
