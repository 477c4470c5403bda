"""Attention transfer: Zagoruyko and Komodakis, "Paying more attention to attention" (ICLR 2017)."""

from typing import ClassVar, Literal

from torch import Tensor, nn

from logitcache.logits import at_least_float32
from logitcache.reductions import FeatureKind, as_maps, attention, resized
from logitcache.student.adapters import PlaceMap, unit
from logitcache.student.losses.base import Context, FeatureLoss, Site
from logitcache.targets import Batch, Targets


def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean over places of (a_s - a_t)², a scalar, at least float32; zero if both agree but for scale.

    a is attention, the mean of squares over channels, as one vector an image of L2 norm 1. `student`: maps [B, C, h, w]
    or tokens [B, N, C], brought to the teacher's size; `teacher`: attention [B, H, W].
    """
    wanted = at_least_float32(teacher)
    maps = resized(as_maps(at_least_float32(student)), (wanted.shape[1], wanted.shape[2]))
    return (unit(attention(maps).flatten(1)) - unit(wanted.flatten(1))).square().mean()


class AttentionTransfer(FeatureLoss):
    """Squared difference of normalised attention maps (Zagoruyko and Komodakis 2017); published with weight 1000."""

    kinds: ClassVar[tuple[FeatureKind, ...]] = ("attention", "maps")

    kind: Literal["attention_transfer"] = "attention_transfer"

    def adapter(self, site: Site) -> nn.Module:
        """Build what brings the teacher's feature, as it is kept, to attention; nothing of it is trained."""
        return PlaceMap(*self.shapes(site))

    def __call__(self, outputs: Targets, batch: Batch, context: Context) -> Tensor:
        """Return the unweighted loss of a batch."""
        student, teacher = self.compared(outputs, batch)
        return attention_transfer(student, context.adapter(teacher))
