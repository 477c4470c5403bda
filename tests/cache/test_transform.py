"""The transform, and what it is made of: exact integers, a trellis, a basis, and rows that fit no step."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from logitcache.cache.encodings import trellis
from logitcache.cache.encodings.basis import compand, expand, fit_basis
from logitcache.cache.encodings.bits import pack_bits, pack_digits, unpack_bits, unpack_digits
from logitcache.cache.encodings.fitted_transform import FittedTransform, TransformForm
from logitcache.cache.encodings.measure import measure, stored, stored_bytes
from logitcache.cache.encodings.top_k import PackedTopK
from logitcache.cache.encodings.transform import Transform
from logitcache.errors import DataError, RecipeError
from logitcache.logits import CompactLogits

NUM_CLASSES, NUM_ROWS = 60, 640


def teacher_logits(count: int = NUM_ROWS, seed: int = 0, width: int = 24) -> Tensor:
    """Make the logits [count, 60] of a linear head over features that are never negative, and little noise."""
    head = torch.randn(width, NUM_CLASSES, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, width, generator=generator).exp() * torch.linspace(1, 0.1, width)
    return features @ head + 0.2 * torch.randn(count, NUM_CLASSES, generator=generator)


@pytest.fixture(scope="module")
def calibration() -> Tensor:
    return teacher_logits()


@pytest.fixture(scope="module")
def fitted(calibration: Tensor) -> FittedTransform:
    return Transform(step=0.5, corrections=9).fit(calibration)


def decoded(fitted: FittedTransform, logits: Tensor) -> Tensor:
    rows = {name: torch.from_numpy(values) for name, values in stored(fitted, logits).items()}
    form = fitted.decode(rows, logits.shape[1])
    assert isinstance(form, CompactLogits)
    return form.logits


@given(st.integers(1, 17), st.integers(1, 9), st.integers(0, 2**31))
def test_bits_come_back(width: int, count: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    values = torch.from_numpy(generator.integers(0, 2**width, (3, count)))
    packed = pack_bits(values, width)
    assert packed.shape == (3, -(-count * width // 8))
    assert torch.equal(unpack_bits(packed, width, count), values)
    # Most significant bits last, as numpy packs them in little order.
    bits = ((values.numpy()[:, :, None] >> np.arange(width)) & 1).reshape(3, -1)
    assert np.array_equal(packed.numpy(), np.packbits(bits, axis=1, bitorder="little"))


@given(st.sampled_from([(16, 2), (6, 3), (3, 5)]), st.integers(1, 16), st.integers(0, 2**31))
def test_digits_come_back(size: tuple[int, int], count: int, seed: int) -> None:
    base, each = size
    lowest = -(base // 2)
    values = np.random.default_rng(seed).integers(lowest, lowest + base, (3, count))
    packed = pack_digits(torch.from_numpy(values), base, each)
    assert packed.shape == (3, -(-count // each))
    assert torch.equal(unpack_digits(packed, base, each, count).long(), torch.from_numpy(values))
    first = [int(value) % base for value in values[0, :each]]
    assert int(packed[0, 0]) == sum(digit * base**place for place, digit in enumerate(first))
    assert not pack_digits(torch.zeros(1, count), base, each).any()


def levels_one_by_one(q: list[int], coupled: int) -> list[int]:
    """Follow the states of the trellis number by number."""
    state, values = 0, []
    for place, number in enumerate(q):
        values.append(-2 * number - 1 if state & 1 and place < coupled else 2 * number)
        state = trellis._next_state(state, number % 2)
    return values


@given(st.lists(st.integers(-9, 9), min_size=1, max_size=90), st.integers(0, 90))
def test_the_product_of_parities_gives_the_bits_of_the_recurrence(q: list[int], coupled: int) -> None:
    found = trellis.half_steps(torch.tensor([q]).float(), trellis.recurrence(coupled, len(q)))
    assert found[0].tolist() == levels_one_by_one(q, coupled)


def test_every_state_has_two_ways_in_and_the_trellis_reaches_all() -> None:
    edges = [trellis._next_state(state, parity) for state in range(trellis.STATES) for parity in (0, 1)]
    assert sorted(edges) == sorted(2 * list(range(trellis.STATES)))


@settings(max_examples=10)
@given(st.integers(0, 2**31), st.integers(0, 5))
def test_viterbi_finds_what_trying_everything_finds(seed: int, coupled: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    exact = torch.randn(1, 5, generator=generator) * 1.5
    bits = trellis.bits(torch.full((5,), 1.5), coupled)
    allowed = [range(-3 if place < coupled else -2, 3) for place in range(5)]
    cost = {}
    for q in itertools.product(*allowed):
        error = sum((a - b) ** 2 for a, b in zip(exact[0].tolist(), levels_one_by_one(list(q), coupled), strict=True))
        cost[q] = error + trellis.RATE * sum(float(bits[place, 16 + number]) for place, number in enumerate(q))
    found = tuple(int(number) for number in trellis.quantise(exact, bits, torch.full((5,), 2.0), coupled)[0])
    assert cost[found] == pytest.approx(min(cost.values()), rel=1e-5)


def test_the_trellis_errs_less_than_rounding_does_at_the_same_spacing() -> None:
    exact = torch.rand(400, 200, generator=torch.Generator().manual_seed(0)) * 40 - 20
    q = trellis.quantise(exact, torch.zeros(200, 32), torch.full((200,), 127.0), 200)
    error = (trellis.half_steps(q, trellis.recurrence(200, 200)) - exact).square().mean()
    # Rounding to even numbers errs by 1/3; no quantiser gains more than πe/6.
    assert 1 / 3 / 1.4233 < error < 1 / 3 / 1.25


def test_bits_are_a_distribution_over_both_signs() -> None:
    for coupled in (0, 3):
        probability = trellis.bits(torch.tensor([0.05, 0.7, 4.0]), coupled).double().exp2().reciprocal()
        total = probability.sum(dim=1)
        assert bool((total > 0.99).all())
        assert bool((total < 1.01).all())


def test_both_quantisers_are_used_alike() -> None:
    """Else an entropy coder, which is not told which one is meant, would lose by that."""
    exact = torch.randn(300, 200, generator=torch.Generator().manual_seed(0)) * 2
    bits, matrix = trellis.bits(torch.full((200,), 2.0), 200), trellis.recurrence(200, 200)
    q = trellis.quantise(exact - 0.5, bits, torch.full((200,), 127.0), 200)
    second = trellis.half_steps(q, matrix) != 2 * q
    for number in (-2, -1, 0, 1):
        shares = [float((q[which] == number).float().mean()) for which in (second, ~second)]
        assert shares[0] == pytest.approx(shares[1], abs=0.02)


def test_the_basis_is_orthonormal() -> None:
    for count in (10, 300):
        basis = fit_basis(teacher_logits(count))
        product = basis.vectors @ basis.vectors.T
        torch.testing.assert_close(product, torch.eye(NUM_CLASSES), atol=1e-4, rtol=0)


@pytest.mark.parametrize("deviation", [0.8, 1.0, 1.2, 1.5, 2.0, 4.0])
def test_quantised_gaussians_are_nearest_to_shrunk_numbers(deviation: float) -> None:
    """Against the best share of all, by least squares."""
    exact = deviation * torch.randn(1000, 100, generator=torch.Generator().manual_seed(0)) - 0.5
    bits = trellis.bits(torch.full((100,), deviation), 100)
    q = trellis.quantise(exact, bits, torch.full((100,), 127.0), 100)
    found, wanted = trellis.half_steps(q, trellis.recurrence(100, 100)) + 0.5, exact + 0.5
    share = float(trellis.shrinkage(torch.tensor([deviation]), 1))
    assert share == pytest.approx(float((found * wanted).sum() / found.square().sum()), abs=0.04)
    assert (share * found - wanted).square().mean() <= (found - wanted).square().mean() * 1.001


@given(st.floats(-1e38, 1e38), st.floats(0.1, 100.0))
def test_companding_is_undone(value: float, bend: float) -> None:
    companded = compand(torch.tensor([value], dtype=torch.float64), bend)
    assert float(expand(companded, bend)) == pytest.approx(value, rel=1e-9)
    assert abs(float(companded)) <= abs(value) * (1 + 1e-9)
    assert float(companded) == pytest.approx(value, rel=(value / bend) ** 2 / 6 + 1e-9)


def test_views_of_an_image_are_held_out_together() -> None:
    """Copies of an image in the fit would make the deviations on held-out rows those of fitted rows."""
    rows = teacher_logits(52, width=60)
    views, images = rows.repeat(4, 1), torch.arange(52).repeat(4)
    small = slice(45, None)
    assert fit_basis(views, images).deviation[small].mean() > 5 * fit_basis(views).deviation[small].mean()


def test_one_row_fits_nothing() -> None:
    with pytest.raises(RecipeError, match="1 rows of logits"):
        Transform().fit(teacher_logits(1))


@pytest.mark.parametrize("step", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("corrections", [0, 1, 7, 100])
def test_the_error_is_that_of_the_step(calibration: Tensor, step: float, corrections: int) -> None:
    logits = teacher_logits(200, seed=1)
    fitted = Transform(step=step, corrections=corrections).fit(calibration)
    error = decoded(fitted, logits) - logits
    # A trellis errs by no more than rounding does; the row mean by step/32; zeroed coefficients by less than a step.
    assert float(error.square().mean().sqrt()) < step * 0.45
    if corrections:
        largest = logits.argmax(dim=1, keepdim=True)
        assert float(error.gather(1, largest).square().mean().sqrt()) < step * 0.25


def test_decoding_repeats_the_ranking_of_the_encoder(fitted: FittedTransform) -> None:
    """In another order of sums, in float64, on rows full of ties: the classes to correct are the same."""
    logits = teacher_logits(300, seed=2)
    rows = {name: torch.from_numpy(values) for name, values in stored(fitted, logits).items()}
    table = fitted._on(torch.device("cpu"))
    parts = [rows[name].float() for name in ("wide", "byte") if name in rows]
    for name, base, each, count in (("pair", 16, 2, "pairs"), ("triple", 6, 3, "triples"), ("quint", 3, 5, "quints")):
        if name in rows:
            parts.append(unpack_digits(rows[name], base, each, getattr(fitted.form, count)).float())
    q = torch.cat(parts, dim=1)
    values = trellis.half_steps(q, table["recurrence"])
    sums = (values.flip(1).double() @ table["basis"].flip(0).double()).long()
    backwards = sums * 2 ** rows["exponent"].long()[:, None] + table["whole_centre"]
    expected = np.argsort(-backwards.numpy(), axis=1, kind="stable")[:, :9]
    found = fitted._approximate(q, rows["exponent"].int(), table)[1]
    assert np.array_equal(found.numpy(), expected)
    flat = fitted._approximate(q * 0, rows["exponent"].int(), {**table, "whole_centre": table["whole_centre"] * 0})[1]
    assert bool((flat == torch.arange(9)).all())


def test_sums_stay_exact_under_autocast(fitted: FittedTransform) -> None:
    logits = teacher_logits(64, seed=3)
    expected = decoded(fitted, logits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(decoded(fitted, logits), expected)


@pytest.mark.parametrize("factor", [30.0, 1e4])
def test_rows_far_beyond_the_calibration_take_longer_steps(fitted: FittedTransform, factor: float) -> None:
    logits = teacher_logits(20, seed=4)
    logits[7] *= factor
    rows = stored(fitted, logits)
    assert rows["exponent"][7] > 0
    error = (decoded(fitted, logits) - logits).square().mean(dim=1).sqrt()
    assert float(error[7]) < 0.5 * 2.0 ** int(rows["exponent"][7])
    assert float(error[7]) < 0.1 * float(logits[7].std())
    others = torch.arange(20) != 7
    assert float(error[others].max()) < 0.4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_rows_that_nothing_holds_are_refused(fitted: FittedTransform, value: float) -> None:
    logits = teacher_logits(5, seed=5)
    logits[3, 11] = value
    with pytest.raises(DataError, match="row 3 of a batch"):
        fitted.encode(logits)


def test_a_fine_step_takes_two_bytes_for_the_largest_coefficients(calibration: Tensor) -> None:
    fitted = Transform(step=0.02).fit(calibration)
    assert fitted.form.wide > 0
    logits = teacher_logits(100, seed=6)
    assert int(stored(fitted, logits)["wide"].max()) > 127
    assert float((decoded(fitted, logits) - logits).abs().max()) < 0.1


def test_the_form_and_the_tables_rebuild_it(fitted: FittedTransform) -> None:
    text = fitted.form.model_dump_json()
    again = TransformForm.model_validate_json(text).ready(fitted.tables)
    logits = teacher_logits(50, seed=7)
    first, second = stored(fitted, logits), stored(again, logits)
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert torch.equal(decoded(fitted, logits), decoded(again, logits))


@pytest.mark.parametrize(
    "change", [{"pairs": 10**9}, {"wide": 10**5}, {"corrections": 10**9}, {"corrections": 1, "correction_bytes": 2}]
)
def test_a_form_of_more_numbers_than_classes_is_refused(fitted: FittedTransform, change: dict[str, int]) -> None:
    form = fitted.form.model_copy(update=change)
    with pytest.raises(RecipeError, match="classes"):
        form.arrays(fitted.tables["basis"].shape[1])


def test_it_beats_packed_top_k_at_equal_bytes(calibration: Tensor) -> None:
    logits = teacher_logits(1000, seed=8)
    transform = Transform(step=0.8, corrections=16).fit(calibration)
    top_k = PackedTopK(k=20)
    assert stored_bytes(transform, logits) < stored_bytes(top_k, logits)
    for ours, theirs in zip(measure(transform, logits, [1, 2, 4]), measure(top_k, logits, [1, 2, 4]), strict=True):
        assert ours.mean < theirs.mean / 2
