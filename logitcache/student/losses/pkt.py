"""Probabilistic transfer: Passalis and Tefas, "Learning deep representations with probabilistic knowledge transfer"
(ECCV 2018).
"""

from typing import ClassVar, Literal

from torch import Tensor

from logitcache.logits import at_least_float32
from logitcache.reductions import pooled
from logitcache.student.adapters import unit
from logitcache.student.losses.base import Context, FeatureLoss, full_precision
from logitcache.targets import Batch, Targets

EPSILON = 1e-7


@full_precision
def pkt(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean over all pairs of images of p_t log(p_t / p_s), a scalar, at least float32; zero at equality.

    p are affinities (1 + cosine) / 2, of which each row is divided by its sum; 1e-7 is added to both in the logarithm.
    `student` and `teacher`: vectors [B, C] and [B, D].
    """
    p_s, p_t = _affinities(student), _affinities(teacher)
    return (p_t * ((p_t + EPSILON) / (p_s + EPSILON)).log()).mean()


def _affinities(features: Tensor) -> Tensor:
    directions = unit(at_least_float32(features))
    # Rounding may take a cosine a little below -1.
    affinities = ((1 + directions @ directions.T) / 2).clamp(min=0)
    return affinities / affinities.sum(dim=1, keepdim=True)


class PKT(FeatureLoss):
    """Probabilistic similarities of the images of a batch, on pooled features (Passalis and Tefas 2018); weight 30000.

    It compares the images of a batch with one another, so `micro_batches` above 1 and a last batch of one image are
    refused.
    """

    by_row: ClassVar[bool] = False
    min_rows: ClassVar[int] = 2

    kind: Literal["pkt"] = "pkt"

    def __call__(self, outputs: Targets, batch: Batch, context: Context) -> Tensor:
        """Return the unweighted loss of a batch."""
        return pkt(*map(pooled, self.compared(outputs, batch)))
