"""Targets and batches: they move and are cut as one."""

from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from logitcache.errors import RecipeError
from logitcache.logits import (
    NO_LOGITS,
    CompactLogits,
    LinearLogits,
    Logits,
    TopKLogits,
    at_least_float32,
    dense_logits,
    log_probs,
    top1,
)
from logitcache.student import losses
from logitcache.targets import Batch, CompactFeature, MixedLabels, Targets


def _top_k(rows: int = 5) -> TopKLogits:
    log_p = torch.arange(rows * 2, dtype=torch.float16).reshape(rows, 2).neg()
    index = torch.tensor([[3, 1]]).expand(rows, 2).to(torch.uint16)
    return TopKLogits(log_p, index, torch.tensor([[-2.0, -3.0, 0.5]]).expand(rows, 3), 4)


def _batch(rows: int = 5) -> Batch:
    dense = Targets(torch.arange(rows * 4.0).reshape(rows, 4), {"pooled": torch.arange(rows * 2.0).reshape(rows, 2)})
    return Batch(
        torch.arange(rows * 9, dtype=torch.uint8).reshape(rows, 1, 3, 3),
        torch.arange(rows),
        torch.stack([torch.zeros(rows), torch.arange(rows)], dim=1).long(),
        {"dense": dense, "few": Targets(_top_k(rows)), "mixed": Targets(_linear(rows))},
        MixedLabels(torch.arange(rows).flip(0), torch.linspace(0, 1, rows)),
    )


def _linear(rows: int = 5) -> LinearLogits:
    return LinearLogits(torch.arange(rows * 4.0).reshape(rows, 4).sin(), _top_k(rows), torch.linspace(0, 1, rows))


def _tensors(batch: Batch) -> list[torch.Tensor]:
    dense, few, linear = batch.teachers["dense"], batch.teachers["few"].compact, batch.teachers["mixed"].compact
    assert isinstance(few, TopKLogits)
    assert isinstance(linear, LinearLogits)
    assert isinstance(linear.partner, TopKLogits)
    assert isinstance(linear.own, torch.Tensor)
    assert batch.mixed is not None
    own = [batch.images, batch.labels, batch.keys, batch.mixed.partners, batch.mixed.share]
    mixed = [linear.own, linear.partner.log_p, linear.share]
    return [*own, dense.logits, dense.features["pooled"], few.log_p, few.index, few.tail, *mixed]


def test_a_batch_is_as_long_as_its_images() -> None:
    assert len(_batch(5)) == 5
    assert len(_batch(1)) == 1


@pytest.mark.parametrize("rows", [slice(1, 3), slice(3, 99), slice(0, 5), slice(2, 2)])
def test_cutting_a_batch_cuts_all_that_is_in_it(rows: slice) -> None:
    whole, part = _batch(), _batch()[rows]
    assert len(part) == len(range(5)[rows])
    for tensor, cut in zip(_tensors(whole), _tensors(part), strict=True):
        assert torch.equal(tensor[rows], cut)
        assert tensor.dtype == cut.dtype


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_moving_a_batch_moves_all_that_is_in_it(device: str) -> None:
    moved = _batch().to(device)
    for tensor, there in zip(_tensors(_batch()), _tensors(moved), strict=True):
        assert there.device.type == device
        assert torch.equal(tensor, there.cpu())


def test_a_batch_moves_to_a_device_by_name_or_by_object() -> None:
    assert torch.equal(_batch().to(torch.device("cpu")).images, _batch().to("cpu").images)


def test_the_targets_of_the_only_teacher_need_no_name() -> None:
    batch = _batch()
    single = Batch(batch.images, batch.labels, batch.keys, {"dense": batch.teachers["dense"]})
    assert single.targets is batch.teachers["dense"]


def test_two_teachers_must_be_named() -> None:
    with pytest.raises(ValueError, match=r"\['dense', 'few', 'mixed'\]: take one, as in batch.teachers\['name'\]"):
        _ = _batch().targets


def test_a_batch_without_teachers_has_no_targets() -> None:
    batch = _batch()
    with pytest.raises(ValueError, match=r"targets of \[\]"):
        _ = Batch(batch.images, batch.labels, batch.keys, {}).targets


@pytest.mark.parametrize("temperature", [0.25, 0.5, 1.0, 2.0, 8.0])
def test_a_top_k_target_is_a_distribution_at_every_temperature(temperature: float) -> None:
    log_p = log_probs(_top_k(), temperature)
    assert log_p.shape == (5, 4)
    assert log_p.dtype == torch.float32
    torch.testing.assert_close(log_p.exp().sum(dim=1), torch.ones(5))


def test_log_probs_are_of_the_divided_logits() -> None:
    logits = torch.tensor([[0.0, 2.0, -4.0]])
    expected = torch.log_softmax(logits / 2, dim=1)
    assert torch.equal(log_probs(logits, 2.0), expected)
    assert torch.equal(log_probs(logits.half(), 2.0), expected)


def test_float64_stays_and_less_than_float32_does_not() -> None:
    dtypes = {dtype: at_least_float32(torch.zeros(1, dtype=dtype)).dtype for dtype in (torch.float16, torch.bfloat16)}
    assert set(dtypes.values()) == {torch.float32}
    assert at_least_float32(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64
    assert log_probs(torch.zeros(1, 2, dtype=torch.float64)).dtype == torch.float64


def test_top1_is_the_most_probable_class() -> None:
    assert top1(torch.tensor([[0.0, 3.0, 1.0], [5.0, 0.0, 0.0]])).tolist() == [1, 0]
    assert top1(_top_k(2)).tolist() == [3, 3]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_linear_targets_are_the_weighted_mean_of_both_distributions(temperature: float) -> None:
    linear = _linear()
    own, partner = (log_probs(logits, temperature).double().exp() for logits in (linear.own, linear.partner))
    share = linear.share.double()[:, None]
    expected = share * own + (1 - share) * partner
    assert torch.allclose(linear.log_probs(temperature).double().exp(), expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(linear.log_probs(temperature)[-1], log_probs(linear.own, temperature)[-1])
    assert linear.num_classes == 4


def _compact(rows: int = 5) -> CompactLogits:
    return CompactLogits({"z": 30 * torch.arange(rows * 4.0).reshape(rows, 4).cos()}, 4, lambda arrays: arrays["z"])


def _all_kept(rows: int = 5) -> TopKLogits:
    log_p = torch.log_softmax(torch.arange(rows * 4.0).reshape(rows, 4).sin(), dim=1)
    return TopKLogits(*log_p.sort(dim=1, descending=True), torch.zeros(rows, 3), 4)


FORMS: dict[str, Logits] = {
    "tensor": 10 * torch.arange(20.0).reshape(5, 4).sin(),
    "float16": torch.arange(20.0).reshape(5, 4).sin().half(),
    "top_k": _top_k(),
    "all_kept": _all_kept(),
    "compact": _compact(),
    "linear": _linear(),
    "linear_of_compact": LinearLogits(_compact(), _top_k(), torch.linspace(0, 1, 5)),
}
temperatures = st.floats(0.0625, 64, width=32)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=25, deadline=None)
@given(values=st.lists(temperatures, min_size=5, max_size=5))
def test_a_temperature_for_each_row_is_that_of_the_row_alone(form: str, values: list[float]) -> None:
    logits = FORMS[form]
    found = log_probs(logits, torch.tensor(values))
    assert found.dtype == torch.float32
    for row, temperature in enumerate(values):
        alone = log_probs(logits[row : row + 1], temperature)
        torch.testing.assert_close(found[row : row + 1], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_a_scalar_temperature_is_the_number_that_it_holds(form: str, temperature: float) -> None:
    for dtype in (torch.float32, torch.float64):
        found = log_probs(FORMS[form], torch.tensor(temperature, dtype=dtype))
        torch.testing.assert_close(found, log_probs(FORMS[form], temperature), rtol=1e-6, atol=1e-6)


def test_one_temperature_for_each_of_other_rows_is_not_broadcast() -> None:
    for logits in FORMS.values():
        with pytest.raises(RuntimeError):
            log_probs(logits, torch.ones(3))


@pytest.mark.parametrize("form", FORMS)
def test_targets_are_tensors_whatever_their_form(form: str) -> None:
    targets = Targets(FORMS[form])
    assert targets.logits.is_floating_point()
    assert targets.logits.shape == (5, 4)
    assert targets.num_classes == 4
    assert targets.keeps_logits == (form in ("tensor", "float16", "compact"))
    assert targets[1:3].logits.shape == targets.to("cpu")[1:3].logits.shape == (2, 4)
    torch.testing.assert_close(log_probs(targets.logits), targets.log_probs())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("temperature", [1, 2.0, torch.tensor(4.0), torch.linspace(1, 5, 5)])
def test_targets_give_the_distribution_of_their_form_at_a_temperature(
    form: str, temperature: float | torch.Tensor
) -> None:
    targets = Targets(FORMS[form])
    assert torch.equal(targets.log_probs(temperature), log_probs(FORMS[form], temperature))
    assert torch.equal(log_probs(targets, temperature), log_probs(FORMS[form], temperature))


def test_the_tail_of_a_top_k_target_is_right_at_a_temperature_and_not_by_dividing_its_log_probabilities() -> None:
    targets = Targets(_top_k())
    assert torch.allclose(targets.log_probs(2.0), _top_k().log_probs(2.0))
    assert not torch.allclose(log_probs(targets.logits, 2.0), targets.log_probs(2.0), atol=0.05)


def test_targets_decode_once_and_where_they_are_read() -> None:
    decoded = []

    def decode(rows: Mapping[str, torch.Tensor]) -> torch.Tensor:
        decoded.append(rows["z"].device.type)
        return rows["z"].float()

    rows = {"z": torch.ones(5, 4, dtype=torch.uint8)}
    targets = Targets(CompactLogits(rows, 4, decode), {"f": CompactFeature(rows, (4,), decode)}).to("cpu")
    assert decoded == []
    first = targets.log_probs(2.0)
    assert targets.log_probs(2) is first
    assert targets.logits is targets.logits
    assert len(decoded) == 1
    assert targets.features["f"] is targets.features["f"]
    assert len(decoded) == 2


def test_features_are_tensors_by_name() -> None:
    rows = {"": torch.ones(5, 4, dtype=torch.float16)}
    compact = CompactFeature(rows, (4,), lambda rows: rows[""].float())
    features = Targets(_top_k(), {"kept": compact, "plain": torch.zeros(5, 2)}).features
    assert list(features) == ["kept", "plain"]
    assert len(features) == 2
    assert features["kept"].dtype == torch.float32
    assert features["plain"].shape == (5, 2)
    with pytest.raises(KeyError):
        features["other"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_public_losses_take_targets(form: str, temperature: float) -> None:
    targets, student, labels = Targets(FORMS[form]), torch.linspace(-1, 1, 20).reshape(5, 4), torch.arange(5) % 4
    p = log_probs(FORMS[form], temperature).double().exp()
    log_q = torch.log_softmax(student.double() / temperature, dim=1)
    expected = temperature**2 * (p * (p.log() - log_q)).nansum(dim=1).mean()
    torch.testing.assert_close(
        losses.kl_divergence(student, targets, temperature), expected.float(), rtol=1e-5, atol=1e-6
    )
    for loss in (losses.dkd, losses.nkd, losses.wsld):
        found = loss(student, targets, labels, temperature=temperature)
        assert torch.equal(found, loss(student, FORMS[form], labels, temperature=temperature))


@pytest.mark.parametrize("form", FORMS)
def test_losses_of_logits_refuse_targets_that_keep_a_distribution(form: str) -> None:
    targets, student = Targets(FORMS[form]), torch.linspace(-1, 1, 20).reshape(5, 4)
    head = torch.ones(4, 3), torch.ones(4)
    calls: list[Callable[[Targets | torch.Tensor], torch.Tensor]] = [
        lambda teacher: losses.mean_squared_error(student, teacher),
        lambda teacher: losses.multi_label_kl(student, teacher, 2.0),
        lambda teacher: losses.dist(student, teacher, temperature=2.0),
        lambda teacher: losses.softmax_regression(student[:, :3], *head, teacher),
        lambda teacher: losses.standardize(teacher),
    ]
    for call in calls:
        if targets.keeps_logits:
            assert torch.equal(call(targets), call(targets.logits))
        else:
            with pytest.raises(RecipeError, match=r"only a distribution over 4 classes.*Fix: a loss of distributions"):
                call(targets)


def test_targets_of_features_alone_have_no_logits() -> None:
    targets = Targets(NO_LOGITS, {"f": torch.zeros(2, 3)})
    assert (targets.keeps_logits, targets.num_classes) == (False, 0)
    for read in (lambda: targets.logits, lambda: targets.log_probs(2.0), lambda: dense_logits(targets)):
        with pytest.raises(RecipeError, match="only features are kept"):
            read()
