"""What models cost, against counts by hand."""

import copy

import pytest
import torch
from torch import Tensor, nn

from logitcache.models import Classifier, Preprocessing
from logitcache.student.evaluation import cost
from logitcache.student.evaluation.cost import (
    Contender,
    LatencyPlan,
    costs,
    count_bytes,
    count_flops,
    count_parameters,
    latencies,
    median_seconds,
)

RGB = Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3)
IMAGE = torch.zeros(3, 8, 10, dtype=torch.uint8)


def convolution(channels: int = 4) -> Classifier:
    layers = [nn.Conv2d(3, channels, 3, stride=2, padding=1), nn.ReLU(), nn.BatchNorm2d(channels), nn.Flatten()]
    return Classifier(nn.Sequential(*layers, nn.Linear(channels * 4 * 5, 7)), RGB)


def by_hand(channels: int) -> int:
    return 2 * (4 * 5 * channels * 3 * 9 + channels * 4 * 5 * 7)


def test_operations_of_a_convolution_and_a_linear_layer_are_those_by_hand() -> None:
    assert count_flops(convolution(4), IMAGE) == by_hand(4)
    assert count_flops(convolution(9), IMAGE) == by_hand(9)


def test_counting_leaves_the_model_as_it_is() -> None:
    model = convolution()
    before = copy.deepcopy(model.state_dict())
    count_flops(model, IMAGE)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Attention(nn.Module):
    """One block over 5 tokens of 8 numbers, in the form that torch joins into one kernel when it evaluates."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True)

    def forward(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.layer(images.flatten(1)[:, :40].reshape(-1, 5, 8))
        return tokens.mean(dim=1)


def test_attention_counts_though_torch_has_a_kernel_for_all_of_it() -> None:
    projections, products, perceptron = 4 * 5 * 8 * 8, 2 * 2 * 5 * 5 * 4, 2 * 5 * 8 * 16
    assert count_flops(Classifier(Attention(), RGB), IMAGE) == 2 * (projections + products + perceptron)
    assert torch.backends.mha.get_fastpath_enabled()


def test_parameters_and_bytes_count_what_is_shared_once() -> None:
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False), nn.BatchNorm1d(6))
    assert count_parameters(model) == 36 + 36 + 12
    assert count_bytes(model) == 4 * (36 + 36 + 12 + 12) + 8
    model[1].weight = model[0].weight
    assert count_parameters(model) == 36 + 12
    assert count_bytes(model) == 4 * (36 + 12 + 12) + 8
    assert count_bytes(nn.Linear(6, 6, bias=False).half()) == 2 * 36


def test_a_teacher_is_compared_where_it_is_at_hand() -> None:
    rows = costs(convolution(4), {"large": Contender(convolution(8), "float32"), "gone": None}, IMAGE)
    assert [row.model for row in rows] == ["student", "large", "gone"]
    student, large, gone = rows
    assert (student.num_parameters, student.flops) == (count_parameters(convolution(4)), by_hand(4))
    assert (student.compression, student.bytes_ratio, student.flops_ratio) == (None, None, None)
    assert large.compression == count_parameters(convolution(8)) / count_parameters(convolution(4))
    assert large.flops_ratio == by_hand(8) / by_hand(4)
    assert set(list(vars(gone).values())[1:]) == {None}


def test_latency_is_the_median_of_what_a_clock_says(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {id(model): iter(times) for model, times in ((SLOW, [9, 9, 4, 1, 2]), (FAST, [9, 9, 0.5, 0.5, 7]))}
    clock = [0.0]

    def forward(model: Classifier, pixels: Tensor) -> Tensor:
        sizes.append((tuple(pixels.shape), torch.get_num_threads()))
        clock[0] += next(seconds[id(model)])
        return torch.zeros(len(pixels), 7)

    sizes: list[tuple[tuple[int, ...], int]] = []
    monkeypatch.setattr(Classifier, "forward", forward)
    monkeypatch.setattr(cost.time, "perf_counter", lambda: clock[0])
    before = torch.get_num_threads()
    plan = LatencyPlan(batch_sizes=(6,), threads=(2,), warm_up=2, repeats=3)
    student, teachers = Contender(FAST, "float32"), {"slow": Contender(SLOW, "bfloat16"), "gone": None}
    fast, slow = latencies(student, teachers, IMAGE, plan)
    assert (fast.model, fast.batch_size, fast.threads, fast.device, fast.seconds) == ("student", 6, 2, "cpu", 0.5)
    assert (fast.images_per_second, fast.speed_up) == (12.0, None)
    assert (slow.model, slow.precision, slow.seconds, slow.speed_up) == ("slow", "bfloat16", 2.0, 4.0)
    assert set(sizes) == {((6, 3, 8, 10), 2)}
    assert torch.get_num_threads() == before


SLOW, FAST = convolution(), convolution()


def test_every_batch_size_is_timed_under_every_number_of_threads() -> None:
    plan = LatencyPlan(batch_sizes=(1, 3), threads=(1, 2), warm_up=1, repeats=2)
    rows = latencies(Contender(FAST, "bfloat16"), {}, IMAGE, plan)
    assert [(row.threads, row.batch_size) for row in rows] == [(1, 1), (1, 3), (2, 1), (2, 3)]
    assert all(row.seconds > 0 for row in rows)
    [row] = latencies(Contender(FAST, "float32"), {}, IMAGE, LatencyPlan(batch_sizes=(2,), repeats=1, warm_up=1))
    assert row.threads == torch.get_num_threads()


def test_models_are_timed_in_turns() -> None:
    called: list[tuple[str, int]] = []

    class Noting(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, pixels: Tensor) -> Tensor:
            called.append((self.name, len(pixels)))
            return pixels

    timed = [(Contender(Noting(name), "float32"), torch.zeros(count, 1)) for name, count in (("a", 1), ("b", 4))]
    found = median_seconds(timed, 1, warm_up=1, repeats=2)
    assert called == [("a", 1), ("b", 4), ("b", 4), ("a", 1), ("a", 1), ("b", 4)]
    assert len(found) == 2
    assert min(found) > 0
