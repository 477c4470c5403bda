"""The largest log-probabilities, with what is needed to stand for the rest."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from logitcache.cache.encodings.base import Plain, RowArray, Storage
from logitcache.errors import RecipeError
from logitcache.logits import Logits, TopKLogits
from logitcache.recipe import Count


class TopK(Plain):
    """The k largest log-probabilities and classes, and of the dropped ones: log total probability, mean, variance.

    Log-probabilities, not probabilities, since float16 has no room for small ones; never renormalised, since a
    distribution without its tail has an infinite divergence from the full one.
    """

    gives: ClassVar[frozenset[str]] = frozenset({"logits"})

    kind: Literal["top_k"] = "top_k"
    k: Count
    storage: Storage = "hot"

    def arrays(self, num_classes: int) -> tuple[RowArray, ...]:
        """List the arrays that a row of `num_classes` logits takes."""
        if self.k > num_classes:
            raise RecipeError(
                f"top_k keeps k = {self.k} of {num_classes} classes. Fix: k <= {num_classes}, or kind: dense"
            )
        index = "uint16" if num_classes <= 2**16 else "uint32"
        return (
            RowArray("log_p", (self.k,), "float16", ("rank",)),
            RowArray("index", (self.k,), index, ("rank",)),
            RowArray("tail", (3,), "float32", ("moment",)),
        )

    def encode(self, logits: Tensor) -> dict[str, Tensor]:
        """Encode logits [B, C]."""
        log_p = torch.log_softmax(logits.float(), dim=1)
        kept, index = log_p.topk(self.k, dim=1)
        is_dropped = torch.ones_like(log_p, dtype=torch.bool).scatter_(1, index, False)
        dropped = log_p[is_dropped].view(len(log_p), log_p.shape[1] - self.k)
        return {"log_p": kept.half(), "index": index.int(), "tail": _moments(dropped)}

    def decode(self, rows: dict[str, Tensor], num_classes: int) -> Logits:
        """Return the encoded form; it becomes a distribution at a temperature, on the device."""
        return TopKLogits(rows["log_p"], rows["index"], rows["tail"], num_classes)


def _moments(dropped: Tensor) -> Tensor:
    """Return the log of the total probability, the mean and the variance of log-probabilities [B, D], as [B, 3]."""
    if dropped.shape[1] == 0:
        # The logarithm of no probability has to be finite.
        return dropped.new_tensor([torch.finfo(torch.float32).min, 0.0, 0.0]).expand(len(dropped), 3)
    variance, mean = torch.var_mean(dropped, dim=1, correction=0)
    return torch.stack([dropped.logsumexp(dim=1), mean, variance], dim=1)
