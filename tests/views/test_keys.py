"""Keys: the words of Philox4x32-10 and what is made of them."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from logitcache.views import keys
from logitcache.views.keys import STREAMS, Draws, ViewKey, below, bernoulli, permutation, philox, uniform

ONES = 0xFFFFFFFF
KNOWN_STREAMS = {
    **{"crop": 0, "flip": 1, "jitter": 2, "randaugment": 3, "erase": 4},
    **{"mix": 5, "pair": 6, "order": 7, "canary": 8, "resized_crop": 9},
    **{"grayscale": 10, "blur": 11, "trivial_augment": 12, "transform": 13},
}
# Counter, key, words: the first, second and third vector of Random123's kat_vectors.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
words32 = st.integers(0, ONES)
words64 = st.integers(0, 2**64 - 1)


def scalar_philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Follow figure 2 of the paper: per round two products; high halves are mixed with key and neighbours."""
    left0, right0, left1, right1 = counter[1], counter[0], counter[3], counter[2]
    for number in range(10):
        k0, k1 = (key[0] + number * 0x9E3779B9) % 2**32, (key[1] + number * 0xBB67AE85) % 2**32
        high0, low0 = divmod(right0 * 0xD2511F53, 2**32)
        high1, low1 = divmod(right1 * 0xCD9E8D57, 2**32)
        right0, left0, right1, left1 = high1 ^ left0 ^ k0, low1, high0 ^ left1 ^ k1, low0
    return right0, left0, right1, left1


def vectorised(counters: list[tuple[int, ...]], key: tuple[int, int]) -> list[tuple[int, ...]]:
    columns = np.array(counters, dtype=np.uint64).T
    words = philox((columns[0], columns[1], columns[2], columns[3]), key)
    return [tuple(row) for row in np.stack(words, axis=1).tolist()]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_gives_the_published_words(counter, key, words):
    assert vectorised([counter], key) == [words]
    assert scalar_philox(counter, key) == words


@given(counters=st.lists(st.tuples(*[words32] * 4), min_size=1, max_size=9), key=st.tuples(words32, words32))
def test_philox_of_a_batch_is_that_of_each_counter_by_integers(counters, key):
    assert vectorised(counters, key) == [scalar_philox(counter, key) for counter in counters]


@given(
    seed=words64,
    keys=st.lists(st.tuples(words32, words64), min_size=1, max_size=5),
    stream=st.sampled_from(sorted(STREAMS)),
    ordinal=st.integers(0, 63),
    count=st.integers(1, 23),
)
def test_words_are_those_of_the_documented_counter(seed, keys, stream, ordinal, count):
    drawn = Draws.of(seed, [ViewKey(*key) for key in keys]).words(stream, ordinal, count)
    for (view, index), row in zip(keys, drawn.tolist(), strict=True):
        low = STREAMS[stream] << 16 | ordinal << 8
        blocks = [
            scalar_philox((low | block, index % 2**32, index >> 32, view), (seed % 2**32, seed >> 32))
            for block in range(6)
        ]
        assert row == [word for block in blocks for word in block][:count]


def test_words_of_a_key_do_not_depend_on_its_batch():
    keys = [ViewKey(view, index) for view in range(3) for index in (0, 1, 2**32 - 1, 2**32, 2**63)]
    together = Draws.of(9, keys).words("crop", 1, 10)
    alone = [Draws.of(9, [key]).words("crop", 1, 10)[0] for key in keys]
    backwards = Draws.of(9, keys[::-1]).words("crop", 1, 10)[::-1]
    assert np.array_equal(together, alone)
    assert np.array_equal(together, backwards)
    assert np.array_equal(together[:, :3], Draws.of(9, keys).words("crop", 1, 3))


@pytest.mark.parametrize("count", [1, 4, 22, 60])
def test_words_of_few_counters_are_those_of_many(count, monkeypatch):
    """Few are computed by Python's integers, many by numpy."""
    default = keys._FEW
    for batch in (1, 2, 3, 5, 11, 12, 13, 14):
        draws = Draws.of(2**40 + 3, [ViewKey(2**32 - 1 - row, 2**31 * row) for row in range(batch)])
        found = []
        for few in (0, default, 10**9):
            monkeypatch.setattr(keys, "_FEW", few)
            found.append(draws.words("crop", 2, count))
        for words in found:
            assert words.dtype == np.uint64
            assert words.shape == (batch, count)
            assert np.array_equal(words, found[0])


def test_philox_broadcasts_its_counters():
    rows, columns = np.arange(3, dtype=np.uint64)[:, None], np.arange(4, dtype=np.uint64)
    together = philox((rows, columns, rows, columns), (1, 2))
    assert all(words.shape == (3, 4) for words in together)
    one = philox((rows[2], columns[3:], rows[2], columns[3:]), (1, 2))
    assert [int(words[2, 3]) for words in together] == [int(words[0]) for words in one]


def test_no_two_draws_share_a_word():
    keys = [ViewKey(0, 1), ViewKey(1, 0), ViewKey(1, 1), ViewKey(0, 2**32), ViewKey(2**32 - 1, 0)]
    seeds = [0, 1, 2**32, 2**32 + 1, 2**63]
    words = [
        Draws.of(seed, keys).words(stream, ordinal, 22)
        for seed in seeds
        for stream in STREAMS
        for ordinal in (0, 1, 63)
    ]
    found = np.stack(words).reshape(-1, 22)
    pairs = found[:, 0::2] << np.uint64(32) | found[:, 1::2]
    assert len(np.unique(pairs)) == pairs.size


def test_a_stream_keeps_its_number():
    assert STREAMS.items() >= KNOWN_STREAMS.items()
    assert len(set(STREAMS.values())) == len(STREAMS)


@pytest.mark.parametrize("stream", sorted(STREAMS))
def test_words_are_uniform_and_independent(stream):
    keys = [ViewKey(view, index) for view in range(8) for index in range(1024)]
    words = Draws.of(5, keys).words(stream, 0, 4)
    low_bytes, high_bytes = words & np.uint64(255), words >> np.uint64(24)
    for octets in (low_bytes, high_bytes):
        counts = np.bincount(octets.astype(np.int64).ravel(), minlength=256)
        assert stats.chisquare(counts).pvalue > 1e-4
    numbers = uniform(words)
    assert stats.kstest(numbers.ravel(), "uniform").pvalue > 1e-4
    neighbours = np.corrcoef(np.concatenate([numbers.T, np.roll(numbers, 1, axis=0).T]))
    assert np.abs(neighbours - np.eye(8)).max() < 0.05


@given(words=st.lists(words32, min_size=1, max_size=9), limit=st.integers(1, 2**31))
def test_below_is_the_high_half_of_the_product(words, limit):
    found = below(np.array(words, dtype=np.uint64), limit)
    assert found.dtype == np.int64
    assert found.tolist() == [word * limit // 2**32 for word in words]
    assert below(np.array([0, ONES], dtype=np.uint64), limit).tolist() == [0, limit - 1]


def test_below_takes_a_limit_for_each_word():
    words = np.full((2, 2), ONES, dtype=np.uint64)
    assert below(words, np.array([[1, 2], [3, 600]])).tolist() == [[0, 1], [2, 599]]


@given(words=st.lists(words32, min_size=1, max_size=9), probability=st.floats(0, 1))
def test_bernoulli_is_exact(words, probability):
    found = bernoulli(np.array(words, dtype=np.uint64), probability)
    assert found.tolist() == [word < int(probability * 2**32) for word in words]


def test_certain_events_are_certain():
    words = np.array([0, 1, ONES], dtype=np.uint64)
    assert bernoulli(words, 1.0).all()
    assert not bernoulli(words, 0.0).any()


@given(word=words32)
def test_uniform_numbers_are_exact_and_below_one(word):
    [number] = uniform(np.array([word], dtype=np.uint64)).tolist()
    assert 0.0 <= number < 1.0
    assert number * 2**32 == word


@given(seed=words64, epoch=words32, count=st.integers(0, 300))
def test_a_permutation_holds_every_index_once_and_depends_on_its_arguments_alone(seed, epoch, count):
    found = permutation(seed, epoch, count)
    random.seed(1)
    np.random.seed(1)
    assert sorted(found.tolist()) == list(range(count))
    assert np.array_equal(found, permutation(seed, epoch, count))


def test_permutations_differ_by_epoch_and_by_each_half_of_the_seed():
    arguments = [(0, 0), (0, 1), (1, 0), (2**32, 0), (2**32 + 1, 0), (0, 2**32 - 1)]
    assert len({tuple(permutation(seed, epoch, 50).tolist()) for seed, epoch in arguments}) == len(arguments)


def test_every_image_is_equally_often_in_every_place():
    places = np.zeros((6, 6))
    for epoch in range(3000):
        places[np.arange(6), permutation(7, epoch, 6)] += 1
    assert stats.chisquare(places.ravel(), ddof=10).pvalue > 1e-4


@pytest.mark.parametrize("count", [65_536, 200_001])
def test_a_permutation_of_many_is_in_order_of_their_words(count):
    places = np.arange(count, dtype=np.uint64)
    words = Draws(6, np.full_like(places, 3), places).words("order", 0, 2)
    assert np.array_equal(permutation(6, 3, count), np.lexsort((places, words[:, 1], words[:, 0])))


def test_equal_words_are_in_order_of_their_places(monkeypatch):
    def few_words(seed, epoch, indices):
        return (indices * 7919 % 11).astype(np.uint64) << np.uint64(54)

    monkeypatch.setattr(keys, "order_words", few_words)
    places = np.arange(150_000)
    assert np.array_equal(permutation(0, 0, 150_000), np.lexsort((places, places * 7919 % 11)))
