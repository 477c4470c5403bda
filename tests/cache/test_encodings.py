"""Encodings: a contract for all, and the mathematics of each."""

import os
from itertools import pairwise
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from logitcache.cache.encodings import Form
from logitcache.cache.encodings.base import LogitsForm
from logitcache.cache.encodings.dense import Dense
from logitcache.cache.encodings.fitted_transform import TransformForm
from logitcache.cache.encodings.head import HeadForm
from logitcache.cache.encodings.top_k import PackedTopK, TopK, kept_and_tail
from logitcache.cache.encodings.uint8 import UInt8
from logitcache.errors import RecipeError
from logitcache.logits import TopKLogits, dense_logits, log_probs, top1
from logitcache.teacher.teacher import first_not_finite

MEMBERS = {*get_args(get_args(Form)[0])} - {TransformForm, HeadForm}
EXAMPLES: list[Any] = [
    Dense(),
    Dense(dtype="float32"),
    Dense(storage="packed"),
    TopK(k=1),
    TopK(k=7),
    TopK(k=40),
    TopK(k=7, storage="packed"),
    UInt8(),
    PackedTopK(k=1),
    PackedTopK(k=7),
    PackedTopK(k=40),
    PackedTopK(k=7, step=0.5),
]
NUM_CLASSES = 40


def heavy_tailed(count: int, num_classes: int = NUM_CLASSES, seed: int = 0) -> Tensor:
    """Make logits such as a trained network's: a skewed bulk, and a few classes far above it."""
    generator = np.random.default_rng(seed)
    bulk = generator.gamma(2.0, 0.9, (count, num_classes))
    peaks = generator.pareto(1.5, (count, num_classes)) * (generator.random((count, num_classes)) < 0.05)
    return torch.from_numpy(bulk + np.minimum(peaks, 12.0)).float()


def stored(encoding: Any, logits: Tensor) -> dict[str, Tensor]:
    """Encode, and cast to what is on the disk."""
    encoded = encoding.encode(logits)
    arrays = encoding.arrays(logits.shape[1])
    return {row.suffix: torch.from_numpy(encoded[row.suffix].numpy().astype(row.dtype)) for row in arrays}


def reference(logits: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return log softmax in float64."""
    values = logits.double().numpy()
    shifted = values - values.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def divergence(logits: Tensor, log_q: Tensor, temperature: float) -> float:
    log_p = torch.from_numpy(reference(logits / temperature))
    return float((log_p.exp() * (log_p - log_q.double())).sum(dim=1).mean())


def test_the_examples_cover_every_kind() -> None:
    assert {type(example) for example in EXAMPLES} == MEMBERS


@pytest.mark.parametrize("form", get_args(get_args(Form)[0]))
def test_every_form_declares_what_readers_rely_on(form: type[LogitsForm]) -> None:
    assert next(iter(form.model_fields)) == "kind"
    assert set(get_args(form.model_fields["storage"].annotation)) <= {"hot", "packed"}
    assert form.gives
    assert form.gives <= {"logits", "raw logits"}


@pytest.mark.parametrize(
    "form",
    [
        *EXAMPLES,
        TransformForm(step=0.5, bend=9.0, wide=3, quints=2, corrections=4),
        HeadForm(width=7, bias=True, storage="hot"),
        HeadForm(width=7, bias=False, storage="packed"),
    ],
    ids=repr,
)
def test_garbage_collection_knows_the_names_of_all_tables(form: LogitsForm) -> None:
    assert form.table_shapes(NUM_CLASSES).keys() <= form.table_names


@pytest.mark.parametrize("encoding", EXAMPLES, ids=repr)
@pytest.mark.parametrize("count", [1, 5])
def test_encode_gives_the_arrays_it_announces(encoding: Any, count: int) -> None:
    encoded = encoding.encode(heavy_tailed(count))
    rows = encoding.arrays(NUM_CLASSES)
    assert set(encoded) == {row.suffix for row in rows}
    for row in rows:
        values = encoded[row.suffix]
        assert tuple(values.shape) == (count, *row.shape)
        assert np.array_equal(values.numpy().astype(row.dtype), values.numpy()), "the cast to the stored dtype loses"
        assert len(row.dims) == len(row.shape)
        assert row.num_bytes == values.numpy().astype(row.dtype)[0].nbytes


@pytest.mark.parametrize("encoding", EXAMPLES, ids=repr)
def test_decoding_gives_a_distribution_near_the_encoded_one(encoding: Any) -> None:
    logits = heavy_tailed(64)
    decoded = encoding.decode(stored(encoding, logits), NUM_CLASSES)
    for temperature in (0.5, 1.0, 2.0, 4.0):
        values = log_probs(decoded, temperature)
        assert values.dtype == torch.float32
        assert values.shape == (64, NUM_CLASSES)
        torch.testing.assert_close(values.double().exp().sum(dim=1), torch.ones(64).double(), atol=1e-5, rtol=0)
    least = {"dense": 1e-5, "uint8": 1e-4}.get(encoding.kind, 0.5)
    assert divergence(logits, log_probs(decoded, 1.0), 1.0) < least
    # Rounding may make others as likely as the likeliest, not likelier.
    likeliest = log_probs(decoded).gather(1, logits.argmax(dim=1, keepdim=True))[:, 0]
    assert torch.equal(likeliest, log_probs(decoded).amax(dim=1))
    assert encoding.kind == "packed_top_k" or torch.equal(top1(decoded), logits.argmax(dim=1))


@pytest.mark.parametrize("encoding", EXAMPLES, ids=repr)
def test_a_row_is_encoded_alike_alone_and_in_a_batch(encoding: Any) -> None:
    logits = heavy_tailed(9)
    together = encoding.encode(logits)
    for row in range(9):
        for suffix, values in encoding.encode(logits[row : row + 1]).items():
            torch.testing.assert_close(values[0], together[suffix][row])


@pytest.mark.parametrize("encoding", EXAMPLES, ids=repr)
def test_encoding_leaves_its_input_alone(encoding: Any) -> None:
    logits = heavy_tailed(3)
    before = logits.clone()
    encoding.encode(logits)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("encoding", EXAMPLES, ids=repr)
def test_large_finite_logits_stay_finite(encoding: Any) -> None:
    logits = heavy_tailed(4) * 50 + 3000
    for values in encoding.encode(logits).values():
        assert first_not_finite(values.float()) is None


@pytest.mark.parametrize(("dtype", "error"), [("float32", 0.0), ("float16", 2.0**-11)])
@given(st.lists(st.floats(-60000, 60000, width=32), min_size=1, max_size=20))
def test_dense_errs_by_no_more_than_its_rounding(dtype: Any, error: float, values: list[float]) -> None:
    logits = torch.tensor([values])
    encoding = Dense(dtype=dtype)
    decoded = dense_logits(encoding.decode(stored(encoding, logits), len(values)))
    # Below the smallest normal float16 the error is absolute.
    assert bool(((decoded.double() - logits.double()).abs() <= error * logits.double().abs() + error * 2**-14).all())


def test_what_does_not_fit_float16_is_noticed() -> None:
    logits = torch.zeros(3, 5)
    logits[1, 0] = 70000.0
    (values,) = Dense().encode(logits).values()
    assert first_not_finite(values) == 1


def test_top_k_refuses_more_classes_than_there_are() -> None:
    with pytest.raises(RecipeError, match="k = 6 of 5 classes"):
        TopK(k=6).arrays(5)
    assert TopK(k=5).arrays(5)[0].shape == (6 + 5 + 5,)


@pytest.mark.parametrize("num_classes", [2**16, 2**16 + 1])
def test_top_k_indices_have_room_for_every_class(num_classes: int) -> None:
    logits = torch.zeros(1, num_classes)
    logits[0, -1] = 5.0
    assert int(top_k(logits, 1).index.long()) == num_classes - 1


@pytest.mark.parametrize("k", [1, 2, 13, 39])
def test_top_k_keeps_what_brute_force_keeps(k: int) -> None:
    logits = heavy_tailed(50, seed=k)
    kept, index, tail = (values.double().numpy() for values in kept_and_tail(logits, k))
    exact = reference(logits)
    order = np.argsort(-exact, axis=1, kind="stable")
    rest = np.take_along_axis(exact, order[:, k:], axis=1)
    assert np.array_equal(index, order[:, :k])
    np.testing.assert_allclose(kept, np.take_along_axis(exact, order[:, :k], 1), rtol=1e-3)
    np.testing.assert_allclose(tail[:, 0], np.log(np.exp(rest).sum(axis=1)), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(tail[:, 1], rest.mean(axis=1), rtol=1e-5)
    np.testing.assert_allclose(tail[:, 2], rest.var(axis=1), rtol=1e-4, atol=1e-5)
    form = top_k(logits, k)
    assert np.array_equal(form.log_p.numpy(), kept.astype(np.float16))
    assert np.array_equal(form.index.long().numpy(), index)
    assert np.array_equal(form.tail.double().numpy(), tail)


@pytest.mark.parametrize("k", [3, 4])
@pytest.mark.parametrize("num_classes", [40, 2**16, 2**16 + 1])
def test_a_row_of_top_k_is_one_record(k: int, num_classes: int) -> None:
    logits = heavy_tailed(5, num_classes)
    logits[0, -1] = 50.0
    (words,) = stored(TopK(k=k), logits).values()
    index = "<u2" if num_classes <= 2**16 else "<u4"
    record = np.dtype([("tail", "<f4", 3), ("index", index, k), ("log_p", "<f2", k)])
    assert words.shape[1] * 2 in (record.itemsize, record.itemsize + 2)
    read = np.ascontiguousarray(words.numpy().view(np.uint8)[:, : record.itemsize]).view(record)[:, 0]
    form = top_k(logits, k)
    assert read["index"][0, 0] == num_classes - 1
    assert np.array_equal(read["index"], form.index.long().numpy())
    assert np.array_equal(read["log_p"], form.log_p.numpy())
    assert np.array_equal(read["tail"], form.tail.numpy())


@pytest.mark.parametrize("size", [100.0, 1e4, 1e30])
def test_top_k_holds_logits_of_any_size(size: float) -> None:
    form = top_k(heavy_tailed(20) * size, 3)
    assert first_not_finite(form.log_p) is first_not_finite(form.tail) is None
    for temperature in (0.5, 1.0, 4.0):
        assert first_not_finite(form.log_probs(temperature).exp()) is None


def test_top_k_of_every_class_has_no_tail() -> None:
    logits = heavy_tailed(6)
    encoding = TopK(k=NUM_CLASSES)
    rows = stored(encoding, logits)
    tail = top_k(logits, NUM_CLASSES).tail
    assert first_not_finite(tail) is None
    assert bool((tail[:, 0].exp() == 0).all())
    for temperature in (0.5, 1.0, 4.0):
        assert divergence(logits, log_probs(encoding.decode(rows, NUM_CLASSES), temperature), temperature) < 1e-4


def test_ties_keep_k_different_classes() -> None:
    encoding = TopK(k=3)
    rows = stored(encoding, torch.tensor([[1.0] * 8, [0.0, 2.0, 2.0, 2.0, 2.0, 0.0, 0.0, 0.0]]))
    form = encoding.decode(rows, 8)
    assert isinstance(form, TopKLogits)
    assert all(len(set(row)) == 3 for row in form.index.tolist())
    assert set(form.index[1].tolist()) <= {1, 2, 3, 4}
    values = log_probs(form, 3.0)
    torch.testing.assert_close(values[0].exp(), torch.full((8,), 0.125), atol=1e-3, rtol=0)


def top_k(logits: Tensor, k: int) -> TopKLogits:
    encoding = TopK(k=k)
    decoded = encoding.decode(stored(encoding, logits), logits.shape[1])
    assert isinstance(decoded, TopKLogits)
    return decoded


def dropped_mass(form: TopKLogits, values: Tensor) -> Tensor:
    return 1 - values.double().exp().gather(1, form.index.long()).sum(dim=1)


@pytest.mark.parametrize("k", [1, 5, 20])
def test_the_tail_mass_is_exact_at_temperature_one(k: int) -> None:
    logits = heavy_tailed(100, seed=k)
    form = top_k(logits, k)
    exact = np.sort(np.exp(reference(logits)), axis=1)[:, :-k].sum(axis=1)
    np.testing.assert_allclose(dropped_mass(form, form.log_probs(1.0)), exact, rtol=3e-3, atol=1e-5)


@settings(max_examples=40)
@given(st.integers(0, 2**31), st.integers(1, 39), st.sampled_from([0.1, 0.5, 0.9, 1.1, 2.0, 5.0, 50.0]))
def test_the_tail_stays_within_the_bounds_of_convexity(seed: int, k: int, temperature: float) -> None:
    form = top_k(heavy_tailed(4, seed=seed), k)
    values = form.log_probs(temperature)
    kept = values.gather(1, form.index.long())
    others = values.clone().scatter_(1, form.index.long(), torch.inf)
    each = others.min(dim=1).values
    # No dropped class is more probable than a kept one, and kept ones keep their ratios.
    assert bool((each <= kept[:, -1] + 1e-4).all())
    expected = (form.log_p.float() - form.log_p[:, :1].float()) / temperature
    torch.testing.assert_close(kept - kept[:, :1], expected, atol=1e-3, rtol=1e-4)
    # As K is convex: between s·mean and s·K(1) where s < 1, above s·K(1) where s > 1.
    s, at_one = 1 / temperature, form.tail[:, 0] - float(np.log(NUM_CLASSES - k))
    offset = kept[:, 0] - s * form.log_p[:, 0].float()
    low, high = (s * form.tail[:, 1], s * at_one) if s <= 1 else (s * at_one, s * form.log_p[:, -1].float())
    assert bool((each - offset >= torch.minimum(low, high) - 2e-3).all())
    assert bool((each - offset <= high + 2e-3).all())


@settings(max_examples=40)
@given(st.integers(0, 2**31), st.integers(1, 39))
def test_a_higher_temperature_never_makes_the_likeliest_class_likelier(seed: int, k: int) -> None:
    form = top_k(heavy_tailed(4, seed=seed), k)
    largest = [form.log_probs(t).max(dim=1).values for t in (0.25, 0.5, 0.8, 1.0, 1.25, 2.0, 4.0, 16.0)]
    for cold, hot in pairwise(largest):
        assert bool((hot <= cold + 1e-4).all())


def real_logits() -> Tensor:
    """Load logits [N, C] from the .npy file that LOGITCACHE_TEST_LOGITS names, or make some."""
    file = os.environ.get("LOGITCACHE_TEST_LOGITS")
    if file:
        return torch.from_numpy(np.load(file)[:1500].astype(np.float32))
    return heavy_tailed(500, 200)


@pytest.mark.parametrize("k", [5, 20])
def test_sharpening_lets_the_tail_fade(k: int) -> None:
    logits = real_logits()
    form = top_k(logits, k)
    assert divergence(logits, form.log_probs(0.25), 0.25) < divergence(logits, form.log_probs(1.0), 1.0) / 4


@pytest.mark.parametrize("temperature", [2.0, 4.0])
@pytest.mark.parametrize("k", [5, 20])
def test_the_tail_is_nearer_than_with_one_moment_or_with_two(temperature: float, k: int) -> None:
    logits = real_logits()
    form, num_classes, s = top_k(logits, k), logits.shape[1], 1 / temperature
    log_mass, mean, variance = form.tail.unbind(1)

    def with_tail(score: Tensor) -> float:
        scores = score[:, None].expand(-1, num_classes).clone().scatter_(1, form.index.long(), form.log_p.float() * s)
        return divergence(logits, torch.log_softmax(scores, dim=1), temperature)

    ours = divergence(logits, form.log_probs(temperature), temperature)
    assert ours < with_tail(s * (log_mass - float(np.log(num_classes - k))))
    assert ours < with_tail(s * mean)
    assert ours <= with_tail(s * mean + s**2 * variance / 2) * 1.001
