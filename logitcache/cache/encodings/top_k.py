"""The k largest log-probabilities of a row, in float16 or rounded, and moments of the others."""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from logitcache.cache.encodings.base import Plain, RowArray
from logitcache.cache.encodings.bits import pack_bits, unpack_bits
from logitcache.cache.format.arrays import Floats, Storage
from logitcache.config.recipe import Count, Positive
from logitcache.errors import RecipeError
from logitcache.logits import Logits, TopKLogits

NUM_MOMENTS = 3
_TAIL_WORDS = 2 * NUM_MOMENTS
_LOWEST = torch.finfo(torch.float16).min
"""In place of -inf: of its exponential nothing is left either."""

LARGEST_FALL = 255

TIE = 2**-16


class LargestLogits(Plain):
    """An encoding of the k largest logits of a row, with the indices of their classes."""

    gives: ClassVar[frozenset[str]] = frozenset({"logits"})
    any_bits: ClassVar[bool] = False

    def wrong_row(self, rows: Mapping[str, Tensor], decoded: Logits) -> tuple[int, str] | None:
        """Find a class that does not exist: as an index it would end in a device assert."""
        assert isinstance(decoded, TopKLogits)
        row = decoded.wrong_row()
        return None if row is None else (row, f"names a class that does not exist, of {decoded.num_classes}")


class TopK(LargestLogits):
    """The k largest log-probabilities and their classes, and log mass, mean and variance of the rest: 4 k + 12 bytes.

    Log-probabilities are stored, as float16 cannot hold small probabilities; they are not renormalised, as a
    distribution without its tail has an infinite divergence from the full one. A row is contiguous, as words of two
    bytes: reading a random row touches one place on disk and in memory.
    """

    kind: Literal["top_k"] = "top_k"
    k: Count = Field(description="Number of classes kept, the most probable ones.", examples=[10])
    storage: Storage = "hot"

    def arrays(self, num_classes: int) -> tuple[RowArray, ...]:
        """List the arrays that a row of `num_classes` logits takes."""
        if self.k > num_classes:
            raise RecipeError(
                f"top_k keeps k = {self.k} of {num_classes} classes. Fix: k <= {num_classes}, or kind: dense"
            )
        after = _TAIL_WORDS + self._index_words(num_classes)
        floats = Floats(0, _TAIL_WORDS, "<f4"), Floats(after, after + self.k, "<f2")
        words = after + self.k
        return (RowArray("", (words + words % 2,), "uint16", ("word",), floats=floats),)

    def encode(self, logits: Tensor) -> dict[str, Tensor]:
        """Encode logits [B, C]."""
        kept, index, tail = kept_and_tail(logits, self.k)
        index = index.to(torch.int16 if logits.shape[1] <= 2**16 else torch.int32)  # as bits: wraps above 2^15
        words = torch.cat([part.view(torch.int16) for part in (tail, index, kept.half())], dim=1)
        return {"": torch.nn.functional.pad(words, (0, words.shape[1] % 2)).view(torch.uint16)}

    def decode(self, rows: dict[str, Tensor], num_classes: int) -> Logits:
        """Return the encoded form; it becomes a distribution at a temperature, on the device."""
        words, after = rows[""], _TAIL_WORDS + self._index_words(num_classes)
        if not len(words):
            words = words.new_empty(words.shape)  # with strides, which NumPy leaves out, and other types need
        sizes = (_TAIL_WORDS, after - _TAIL_WORDS, self.k, words.shape[1] - after - self.k)
        tail, index, kept, _ = words.split_with_sizes(sizes, dim=1)  # in less time than slices take
        index = index if num_classes <= 2**16 else index.view(torch.int32)
        return TopKLogits(kept.view(torch.float16), index, tail.view(torch.float32), num_classes)

    def _index_words(self, num_classes: int) -> int:
        return self.k if num_classes <= 2**16 else 2 * self.k


def kept_and_tail(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the k largest log-probabilities [B, k] of logits [B, C], their classes [B, k], and of the others [B, 3].

    Of the dropped log-probabilities these are the log of their total probability, their mean and their variance.
    """
    log_p = torch.log_softmax(logits.float(), dim=1).clamp(min=_LOWEST)
    kept, index = log_p.topk(k, dim=1)
    if k == log_p.shape[1]:
        # The logarithm of no probability has to be finite.
        return kept, index, log_p.new_tensor([_LOWEST, 0.0, 0.0]).repeat(len(log_p), 1)
    dropped = log_p.gather(1, _others(index, log_p.shape[1]))
    variance, mean = torch.var_mean(dropped, dim=1, correction=0)
    return kept, index, torch.stack([dropped.logsumexp(dim=1), mean, variance], dim=1)


def _others(index: Tensor, num_classes: int) -> Tensor:
    """Return the classes, ascending, that rows of classes [B, k] lack; a mask would make the host wait for the device.

    The j-th of them is j plus the number of kept classes before it: those that have at most j others before them.
    """
    rows, k = index.shape
    places = torch.arange(num_classes - k, device=index.device).expand(rows, -1).contiguous()
    before = index.sort(dim=1).values - torch.arange(k, device=index.device)
    return places + torch.searchsorted(before, places, right=True)


class PackedTopK(LargestLogits):
    """The content of `top_k` in about half the bytes: about 24 for 10 of 1,000 classes after compression.

    Classes take ⌈log₂ C⌉ bits each, log-probabilities are stored as differences from the previous rank, and the three
    moments of the rest in float16. A difference beyond 255 steps (a factor of e^-16 at a step of 1/16) is spread over
    the following ranks.
    """

    kind: Literal["packed_top_k"] = "packed_top_k"
    k: Count = Field(description="Number of classes kept, the most probable ones.", examples=[10])
    step: Positive = Field(
        default=0.0625, description="Step in nats, to whose multiples log-probabilities are rounded."
    )
    storage: Storage = "packed"

    def arrays(self, num_classes: int) -> tuple[RowArray, ...]:
        """List the arrays that a row of `num_classes` logits takes."""
        TopK(k=self.k).arrays(num_classes)
        num_bytes = -(-self.k * _width(num_classes) // 8)
        return (
            RowArray("index", (num_bytes,), "uint8", ("byte",)),
            RowArray("fall", (self.k,), "uint8", ("rank",), "component"),
            RowArray("tail", (NUM_MOMENTS,), "float16", ("moment",), "component"),
        )

    def encode(self, logits: Tensor) -> dict[str, Tensor]:
        """Encode logits [B, C]."""
        log_p, index, tail = kept_and_tail(logits, self.k)
        ranks = torch.arange(1, self.k + 1, device=logits.device)
        # The depth of a rank is at most 255 steps below that of the rank before.
        depth = (log_p / -self.step).round() - LARGEST_FALL * ranks
        depth = torch.cummin(depth, dim=1).values + LARGEST_FALL * ranks
        falls = torch.diff(depth, dim=1, prepend=torch.zeros_like(depth[:, :1]))
        return {
            "index": pack_bits(index, _width(logits.shape[1])),
            "fall": falls.nan_to_num(0.0, 0.0, 0.0).to(torch.uint8),
            "tail": tail.half(),
        }

    def decode(self, rows: dict[str, Tensor], num_classes: int) -> Logits:
        """Return the encoded form; it becomes a distribution at a temperature, on the device."""
        ranks = torch.arange(self.k, device=rows["fall"].device)
        # What fell by nothing stays below: the first rank is the most probable class.
        log_p = rows["fall"].float().cumsum(dim=1) * -self.step - ranks * TIE
        return TopKLogits(log_p, unpack_bits(rows["index"], _width(num_classes), self.k), rows["tail"], num_classes)


def _width(num_classes: int) -> int:
    """Return the number of bits of the index of one of `num_classes` classes."""
    return max(1, (num_classes - 1).bit_length())
