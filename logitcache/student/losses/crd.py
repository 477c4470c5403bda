"""Contrastive distillation: Tian, Krishnan and Isola, "Contrastive representation distillation" (ICLR 2020)."""

import math
from typing import ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from logitcache.config.recipe import Count, Fraction, Positive
from logitcache.logits import at_least_float32
from logitcache.reductions import pooled
from logitcache.student.adapters import Projection, num_pooled, unit
from logitcache.student.losses.base import Context, FeatureLoss, Site, full_precision
from logitcache.targets import Batch, Targets


@full_precision
def crd(positive: Tensor, negative: Tensor, offset: Tensor) -> Tensor:
    """Return the mean over rows of -log σ(s⁺ - c) - Σ_k log σ(c - s⁻_k), a scalar, at least float32.

    Noise-contrastive estimation, equation 18 of the paper, on logarithms: D = e^s/Z / (e^s/Z + K/N) is σ(s - c) with
    c = log(Z K / N). `positive`: scores [B] of pairs of one image; `negative`: [B, K] of pairs of two, -inf for one
    that does not count; `offset`: c. Scores are cosines over a temperature. At least 0, and never reached.
    """
    own = F.logsigmoid(at_least_float32(positive) - offset)
    others = F.logsigmoid(offset - at_least_float32(negative))
    return -(own + others.sum(dim=1)).mean()


class ContrastiveMemory(nn.Module):
    """Embeddings of both sides, and for every image of the data set what they were when it was last seen, [N, size].

    `offset`: c of the loss, for the student's and for the teacher's embeddings as anchors; fixed by the first batch.
    """

    seen_student: Tensor
    seen_teacher: Tensor
    offset: Tensor

    def __init__(
        self,
        num_student: int,
        num_teacher: int,
        num_images: int,
        size: int = 128,
        num_negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
    ) -> None:
        super().__init__()
        self.student, self.teacher = Projection(num_student, size), Projection(num_teacher, size)
        self._num_negatives = max(1, min(num_negatives, num_images - 1))
        self._temperature, self._momentum = temperature, momentum
        bound = math.sqrt(3 / size)  # norms of about 1
        for name in ("seen_student", "seen_teacher"):
            self.register_buffer(name, torch.empty(num_images, size).uniform_(-bound, bound))
        self.register_buffer("offset", torch.full((2,), math.nan))

    def forward(self, student: Tensor, teacher: Tensor, images: Tensor) -> Tensor:
        """Contrast vectors [B, C] and [B, D] of images, int64 [B], with what was seen; in training, remember them."""
        ours, theirs = unit(self.student(student)), unit(self.teacher(teacher))
        others = torch.randint(len(self.seen_student), (self._num_negatives,), device=images.device)
        loss = self._side(0, ours, self.seen_teacher, images, others)
        loss = loss + self._side(1, theirs, self.seen_student, images, others)
        if self.training:
            self._remember(self.seen_student, images, ours)
            self._remember(self.seen_teacher, images, theirs)
        return loss

    def _side(self, side: int, embeddings: Tensor, seen: Tensor, images: Tensor, others: Tensor) -> Tensor:
        with torch.autocast(embeddings.device.type, enabled=False):
            positive = (embeddings * seen[images].to(embeddings)).sum(dim=1) / self._temperature
            negative = embeddings @ seen[others].to(embeddings).T / self._temperature
        negative = negative.masked_fill(images[:, None] == others, -torch.inf)
        return crd(positive, negative, self._fix(side, torch.cat([positive[:, None], negative], dim=1)))

    @torch.no_grad()
    def _fix(self, side: int, scores: Tensor) -> Tensor:
        """Return c = log K + log of the mean of e^s over the first scores [B, 1 + K] that count."""
        mean = scores.flatten().logsumexp(0) - scores.isfinite().sum().log()
        offset = self.offset[side]
        self.offset[side] = torch.where(offset.isnan(), mean + math.log(self._num_negatives), offset)
        return self.offset[side].clone()

    @torch.no_grad()
    def _remember(self, seen: Tensor, images: Tensor, embeddings: Tensor) -> None:
        """Move what was seen of some images towards what is seen now; of one that is there twice the last counts."""
        order = torch.arange(len(images), device=images.device)
        last = torch.where(images[:, None] == images, order, -1).amax(dim=1)
        seen[images] = unit(self._momentum * seen[images] + (1 - self._momentum) * embeddings[last].to(seen))


class CRD(FeatureLoss):
    """Contrastive representation distillation (Tian et al. 2020) on embeddings of pooled features; published with
    weight 0.8.

    This is the authors' noise-contrastive estimate rather than InfoNCE, for which the weight and K were published. K
    negatives are drawn per batch, uniformly from all images, and shared by its rows (the authors draw K for each row,
    with B times the memory). A row excludes itself, but not other images of its class, as the authors' sampling by
    labels does. Two memory banks of N × `size` float32 are kept, also in every checkpoint. Each call in training
    updates them, so with micro_batches the result equals that of the whole batch only on average.
    """

    remembers_rows: ClassVar[bool] = True

    kind: Literal["crd"] = "crd"
    num_negatives: Count = Field(
        default=16384, description="Number of negatives that each image is compared with, at most all other images."
    )
    temperature: Positive = Field(default=0.07, description="Temperature: divisor of the similarity of two embeddings.")
    momentum: Fraction = Field(
        default=0.5, description="Share of its old embedding that the memory bank keeps when an image is seen again."
    )
    size: Count = Field(
        default=128,
        description="Dimension of an embedding. The memory banks take 2 · images · `size` float32 numbers, also in "
        "each checkpoint.",
    )

    def adapter(self, site: Site) -> nn.Module:
        """Build embeddings and banks."""
        student, kept = self.shapes(site)
        options = (self.size, self.num_negatives, self.temperature, self.momentum)
        return ContrastiveMemory(num_pooled(student), num_pooled(kept.shape), site.num_images, *options)

    def __call__(self, outputs: Targets, batch: Batch, context: Context) -> Tensor:
        """Return the unweighted loss of a batch, and remember its embeddings."""
        vectors = map(pooled, self.compared(outputs, batch))
        return cast(Tensor, context.adapter(*vectors, batch.keys[:, 1].long()))
