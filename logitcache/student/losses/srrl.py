"""Softmax regression: Yang et al., "Knowledge distillation via softmax regression representation learning" (ICLR
2021).
"""

from typing import ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from logitcache.errors import RecipeError
from logitcache.logits import Logits, at_least_float32, dense_logits
from logitcache.reductions import pooled
from logitcache.student.adapters import Projection, num_pooled
from logitcache.student.losses.base import Context, FeatureLoss, Need, Site, full_precision, targets_of
from logitcache.student.losses.hint import hint
from logitcache.student.optim.schedules import Weight, constant
from logitcache.targets import Batch, Targets


@full_precision
def softmax_regression(student: Tensor, weight: Tensor, bias: Tensor, logits: Logits) -> Tensor:
    """Return the mean of (W f_s + b - z_t)² over rows and classes, a scalar, at least float32.

    The logits of the teacher's last layer on the student's features, against those on the teacher's. `student`:
    vectors [B, D] of a projection that is trained with the student; `weight`: [C, D]; `bias`: [C]; `logits`: [B, C]
    or a batch's targets. Raises RecipeError if these keep no logits.
    """
    features = at_least_float32(student)
    answers = F.linear(features, weight.to(features), bias.to(features))
    # PyTorch 2.6 has no gradient of mse_loss between two types.
    return F.mse_loss(answers, at_least_float32(dense_logits(logits)).to(answers))


class TeacherHead(nn.Module):
    """A projection of the student's features, and the teacher's last layer, which is not trained."""

    weight: Tensor
    bias: Tensor

    def __init__(self, num_in: int, num_out: int, head: tuple[Tensor, Tensor] | None) -> None:
        super().__init__()
        self.project = Projection(num_in, num_out)
        weight, bias = head or (torch.zeros(0, num_out), torch.zeros(0))
        # The cache has them: a checkpoint need not.
        self.register_buffer("weight", weight.float(), persistent=False)
        self.register_buffer("bias", bias.float(), persistent=False)


class SRRL(FeatureLoss):
    """Squared errors of pooled features, and of the logits that the teacher's last layer computes from the student's
    (Yang 2021).

    Both use a linear projection of the student's pooled features, which keeps rows independent; the authors' code adds
    batch normalisation and ReLU. The feature is `penultimate` of a cache with `logits: {kind: head}`.
    """

    terms: ClassVar[tuple[str, ...]] = ("feature_weight", "logit_weight")

    kind: Literal["srrl"] = "srrl"
    feature_weight: Weight = Field(default=constant(1.0), description="Weight of the squared error of the features.")
    logit_weight: Weight = Field(
        default=constant(1.0),
        description="Weight of the squared error of the logits; 0 compares only features, and needs no head.",
    )

    @property
    def needs(self) -> frozenset[Need]:
        """What the loss needs of its data."""
        return frozenset({"head", "raw logits"} if self._takes_head else ())

    @property
    def _takes_head(self) -> bool:
        return self.logit_weight != constant(0.0)

    def adapter(self, site: Site) -> nn.Module:
        """Build the projection, beside the teacher's last layer; raises RecipeError if that takes other features."""
        student, kept = self.shapes(site)
        head = site.teacher(self.teacher).head if self._takes_head else None
        num_in, num_out = num_pooled(student), num_pooled(kept.shape)
        if head is not None and head[0].shape[1] != num_out:
            raise RecipeError(
                f"feature {self.feature!r} has {num_out} channels, the teacher's last layer takes {head[0].shape[1]}. "
                "Fix: keep what that layer takes in, as in tap: fc:input"
            )
        return TeacherHead(num_in, num_out, head)

    def __call__(self, outputs: Targets, batch: Batch, context: Context) -> Tensor:
        """Return the unweighted loss of a batch."""
        student, teacher = self.compared(outputs, batch)
        head = cast(TeacherHead, context.adapter)
        projected = head.project(pooled(student))
        of_features, of_logits = (weight.at(context.progress) for weight in (self.feature_weight, self.logit_weight))
        loss = of_features * hint(projected, pooled(teacher))
        if not self._takes_head:
            return loss
        answers = targets_of(batch.teachers, self.teacher)
        return loss + of_logits * softmax_regression(projected, head.weight, head.bias, answers)
