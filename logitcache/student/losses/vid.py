"""Variational information distillation: Ahn et al. (CVPR 2019), and the authors' code for the regressor."""

import math
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from logitcache.logits import at_least_float32
from logitcache.reductions import FeatureKind
from logitcache.student.adapters import matched, num_channels, perceptron
from logitcache.student.losses.base import Context, FeatureLoss, Site
from logitcache.targets import Batch, Targets

EPSILON = 1e-5
FIRST_VARIANCE = 5.0


def vid(mean: Tensor, alpha: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean of ½ [(μ - f_t)² / σ² + log σ²], σ² = softplus(α) + 1e-5, a scalar, at least float32.

    The negative log-likelihood of the teacher's features, but for a constant. `mean` and `teacher`: [..., C]; `alpha`:
    [C]. Smallest, not zero, if both agree: half the mean of log σ².
    """
    variance = F.softplus(at_least_float32(alpha)) + EPSILON
    error = at_least_float32(mean) - at_least_float32(teacher)
    return (error.square() / variance + variance.log()).mean() / 2


class Variational(nn.Module):
    """Three 1 × 1 convolutions that predict the teacher's features, and the variance of each channel."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.mean = perceptron([num_in, num_out, num_out, num_out])
        self.alpha = nn.Parameter(torch.full((num_out,), math.log(math.expm1(FIRST_VARIANCE - EPSILON))))


class VID(FeatureLoss):
    """Negative log-likelihood of the teacher's features under a Gaussian predicted from the student's (Ahn et al.
    2019).

    Usual with weight 1; its minimum is not zero.
    """

    kinds: ClassVar[tuple[FeatureKind, ...]] = ("maps", "pooled")

    kind: Literal["vid"] = "vid"

    def adapter(self, site: Site) -> nn.Module:
        """Build the regressor, with variances of 5."""
        student, kept = self.shapes(site)
        return Variational(*num_channels(student, kept.shape))

    def __call__(self, outputs: Targets, batch: Batch, context: Context) -> Tensor:
        """Return the unweighted loss of a batch."""
        student, teacher = matched(*self.compared(outputs, batch))
        adapter = cast(Variational, context.adapter)
        return vid(adapter.mean(student), adapter.alpha, teacher)
