"""The losses of DeepInversion, compared with loops over pixels, channels and pairs, and with finite differences."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from logitcache.classifier import Classifier
from logitcache.stage_one.synthesize import losses
from logitcache.stage_one.synthesize.batches import Synthesizer
from logitcache.stage_one.synthesize.losses import BatchNormInputs
from tests.stage_one.synthesized import NUM_CLASSES, PREPROCESSING, SIDE, images, learner, network, synthesis


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def brute_batch_norm(inputs: np.ndarray, mean: np.ndarray, variance: np.ndarray) -> float:
    """Sum over channels, one by one: ‖μ(x̂) − μ‖ + ‖σ²(x̂) − σ²‖ of arXiv:1912.08795, equation 4."""
    of_mean = of_variance = 0.0
    for channel in range(inputs.shape[1]):
        values = [float(v) for row in inputs for v in np.ravel(row[channel])]
        centre = sum(values) / len(values)
        of_mean += (centre - mean[channel]) ** 2
        of_variance += (sum((v - centre) ** 2 for v in values) / len(values) - variance[channel]) ** 2
    return float(of_mean**0.5 + of_variance**0.5)


@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 6), (4, 3, 5, 2)])
def test_statistics_of_a_batch_are_compared_with_the_running_ones(shape: tuple[int, ...]) -> None:
    inputs, mean, variance = drawn(*shape), drawn(3), drawn(3).abs()
    expected = brute_batch_norm(inputs.numpy(), mean.numpy(), variance.numpy())
    assert float(losses.batch_norm_loss(inputs, mean, variance)) == pytest.approx(expected, rel=1e-12)


def test_the_loss_is_zero_for_the_batch_that_made_the_running_statistics() -> None:
    layer, inputs = nn.BatchNorm2d(3, momentum=1.0), drawn(4, 3, 5, 5).float()
    layer(inputs)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    biased = layer.running_var * 99 / 100  # torch keeps the unbiased variance, of 100 values
    assert float(losses.batch_norm_loss(inputs, layer.running_mean, biased)) < 1e-5


def brute_differences(image: np.ndarray) -> dict[tuple[int, int], list[float]]:
    """All differences of pixels [C, H, W] to a neighbour, by the step to it."""
    found: dict[tuple[int, int], list[float]] = {}
    channels, height, width = image.shape
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
        for channel in range(channels):
            for y in range(height):
                for x in range(width):
                    if 0 <= y + down < height and 0 <= x + right < width:
                        value = image[channel, y + down, x + right] - image[channel, y, x]
                        found.setdefault((down, right), []).append(float(value))
    return found


@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (3, 3, 5, 2)])
def test_total_variation_is_that_of_a_loop_over_neighbours(shape: tuple[int, int, int, int]) -> None:
    pixels = drawn(*shape)
    each = [brute_differences(image) for image in pixels.numpy()]
    steps = each[0].keys()
    assert len(steps) == 4
    l1 = sum(np.mean([abs(v) for one in each for v in one[step]]) for step in steps)
    l2 = sum(np.mean([sum(v * v for v in one[step]) ** 0.5 for one in each]) for step in steps)
    assert float(losses.total_variation_l1(pixels)) == pytest.approx(l1, rel=1e-12)
    assert float(losses.total_variation_l2(pixels)) == pytest.approx(l2, rel=1e-12)
    norms = [sum(float(v) ** 2 for v in np.ravel(image)) ** 0.5 for image in pixels.numpy()]
    assert float(losses.l2_norm(pixels)) == pytest.approx(np.mean(norms), rel=1e-12)


def test_diversity_is_the_mean_cosine_of_pairs_of_a_class() -> None:
    features, labels = drawn(6, 4), [0, 1, 0, 0, 1, 2]
    cosines = []
    for first in range(6):
        for second in range(first):
            if labels[first] == labels[second]:
                a, b = features[first].numpy(), features[second].numpy()
                cosines.append(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
    assert len(cosines) == 4
    found = losses.diversity_loss(features, torch.tensor(labels))
    assert float(found) == pytest.approx(np.mean(cosines), rel=1e-12)
    assert float(losses.diversity_loss(features, torch.arange(6))) == 0


def test_competition_is_one_less_the_divergence_of_jensen_and_shannon() -> None:
    first, second = drawn(5, 4), 2 * drawn(4, 5).T

    def softmax(logits: np.ndarray) -> np.ndarray:
        return np.asarray(np.exp(logits) / np.exp(logits).sum(1, keepdims=True))

    p, q = softmax(first.numpy()), softmax(second.numpy())

    def entropy(rows: np.ndarray) -> np.ndarray:
        return np.asarray(-(rows * np.log(rows)).sum(1))

    divergence = entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2  # its other form: of entropies
    assert float(losses.competition_loss(first, second)) == pytest.approx(1 - divergence.mean(), rel=1e-12)
    assert float(losses.competition_loss(first, first)) == pytest.approx(1)
    apart = torch.tensor([[100.0, 0.0]]), torch.tensor([[0.0, 100.0]])
    assert float(losses.competition_loss(*apart)) == pytest.approx(1 - np.log(2), rel=1e-6)


def synthesizer(student: nn.Module | None = None, **changes: object) -> Synthesizer:
    learned = None if student is None else Classifier(student, PREPROCESSING).eval()
    return Synthesizer(
        synthesis(**changes), Classifier(network(), PREPROCESSING).eval(), learned, NUM_CLASSES, (1, SIDE, SIDE)
    )


def test_hooks_see_the_input_of_every_layer_and_go_away() -> None:
    teacher, (pixels, _) = network(), images(5)
    inputs, expected = pixels, []
    for layer in teacher:
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            mean, variance = layer.running_mean.numpy(), layer.running_var.numpy()
            expected.append(brute_batch_norm(inputs.detach().numpy(), mean, variance))
            pooled = inputs.detach().numpy().reshape(5, 4, -1).mean(2)
            features = (pooled - mean) / np.sqrt(variance + layer.eps)
        inputs = layer(inputs)
    with BatchNormInputs(teacher) as statistics:
        for _ in range(2):  # each pass is taken by itself
            teacher(pixels)
            found = statistics.take()
            assert [float(one) for one in found.losses] == pytest.approx(expected, rel=1e-5)
            assert np.allclose(found.features.detach().numpy(), features, atol=1e-5)
    assert not any(layer._forward_pre_hooks for layer in teacher)


def test_the_total_is_the_weighted_sum_of_the_paper() -> None:
    weights = {"label": 2, "batch_norm": 0.5, "first_batch_norm": 7, "total_variation_l1": 0.1, "l2": 0.3}
    weights |= {"total_variation_l2": 0.2, "diversity": 0.4, "competition": 0.6}
    made, (pixels, labels) = synthesizer(learner(), losses=weights), images(6)
    with BatchNormInputs(made.teacher.module) as statistics:
        terms = made.terms(pixels, labels, statistics)
        made.teacher.module((pixels - 0.4) / 0.25)
        first, second = (float(one) for one in statistics.take().losses)
    assert float(terms["batch_norm"]) == pytest.approx(7 * first + second, rel=1e-5)
    logits = made.teacher.module((pixels - 0.4) / 0.25)
    assert float(terms["label"]) == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-5)
    expected = sum(weights[name] * float(term) for name, term in terms.items())
    assert terms.keys() == weights.keys() - {"first_batch_norm"}
    assert float(made.total(terms)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("term", ["label", "batch_norm", "total_variation_l2", "l2", "diversity", "competition"])
def test_the_gradient_that_reaches_the_pixels_is_that_of_finite_differences(term: str) -> None:
    made, (pixels, labels) = synthesizer(learner()), images(4)
    made.teacher.double()
    assert made.student is not None
    made.student.double()
    pixels, labels = pixels.double().requires_grad_(), torch.tensor([0, 0, 1, 1])
    with BatchNormInputs(made.teacher.module) as statistics:

        def loss(values: Tensor) -> Tensor:
            return made.terms(values, labels, statistics)[term]

        assert torch.autograd.gradcheck(loss, (pixels,), eps=1e-6, atol=1e-4, fast_mode=True)
        (gradient,) = torch.autograd.grad(loss(pixels), [pixels])
    assert (gradient.flatten(1).abs().sum(1) > 0).all()
