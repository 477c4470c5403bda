"""Similarity preserving: Tung and Mori, "Similarity-preserving knowledge distillation" (ICCV 2019)."""

from typing import ClassVar, Literal

from torch import Tensor

from logitcache.logits import at_least_float32
from logitcache.reductions import pooled
from logitcache.student.adapters import unit
from logitcache.student.losses.base import Context, FeatureLoss, full_precision
from logitcache.targets import Batch, Targets


@full_precision
def similarity(student: Tensor, teacher: Tensor) -> Tensor:
    """Return ‖G_s - G_t‖² / B², G = f fᵀ with rows of L2 norm 1, a scalar, at least float32; zero if both agree.

    `student` [B, ...] and `teacher` [B, ...]: features of any shapes, each taken as one vector an image.
    """
    return (_gram(student) - _gram(teacher)).square().mean()


def _gram(features: Tensor) -> Tensor:
    vectors = at_least_float32(features).flatten(1)
    return unit(vectors @ vectors.T)


class Similarity(FeatureLoss):
    """Pairwise similarities of the images of a batch (Tung and Mori 2019); published with weight 3000.

    It compares the images of a batch with one another, so `micro_batches` above 1 and a last batch of one image are
    refused. Maps are compared unpooled; with a pooled feature, the student's tap is pooled too.
    """

    by_row: ClassVar[bool] = False
    min_rows: ClassVar[int] = 2

    kind: Literal["similarity"] = "similarity"

    def __call__(self, outputs: Targets, batch: Batch, context: Context) -> Tensor:
        """Return the unweighted loss of a batch."""
        student, teacher = self.compared(outputs, batch)
        return similarity(pooled(student) if teacher.ndim == 2 else student, teacher)
