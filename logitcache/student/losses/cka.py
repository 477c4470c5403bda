"""Centred kernel alignment: Kornblith et al., "Similarity of neural network representations revisited" (ICML 2019)."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from logitcache.logits import at_least_float32
from logitcache.reductions import pooled
from logitcache.student.adapters import unit
from logitcache.student.losses.base import Context, FeatureLoss, full_precision
from logitcache.targets import Batch, Targets


@full_precision
def cka(student: Tensor, teacher: Tensor) -> Tensor:
    """Return 1 - linear CKA, in [0, 1], a scalar, at least float32; zero if both agree but for rotation and scale.

    CKA = ‖F_tᵀ F_s‖² / (‖F_sᵀ F_s‖ ‖F_tᵀ F_t‖), Frobenius norms, of features centred over the batch. The loss is 1
    if either does not vary, as in a batch of one. `student` and `teacher`: vectors [B, C] and [B, D].
    """
    gram_s, gram_t = _centred_gram(student), _centred_gram(teacher)
    norms = torch.linalg.vector_norm(gram_s) * torch.linalg.vector_norm(gram_t)
    alignment: Tensor = (gram_s * gram_t).sum() / norms.where(norms > 0, 1)
    return 1 - alignment


def _centred_gram(features: Tensor) -> Tensor:
    vectors = at_least_float32(features)
    centred = unit((vectors - vectors.mean(dim=0)).flatten()).view_as(vectors)
    return centred @ centred.T


class CKA(FeatureLoss):
    """One minus linear CKA within the batch, on pooled features (Kornblith et al. 2019).

    It compares the images of a batch with one another, so `micro_batches` above 1 and a last batch of one or two images
    are refused.
    """

    by_row: ClassVar[bool] = False
    min_rows: ClassVar[int] = 3  # two rows, centred, are one vector and its negative

    kind: Literal["cka"] = "cka"

    def __call__(self, outputs: Targets, batch: Batch, context: Context) -> Tensor:
        """Return the unweighted loss of a batch."""
        return cka(*map(pooled, self.compared(outputs, batch)))
