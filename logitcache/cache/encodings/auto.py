"""The smallest encoding within an error budget, measured on rows that it was not fitted to."""

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from logitcache.cache.encodings.base import CalibrationSample, LogitsCodec, LogitsEncoding
from logitcache.cache.encodings.basis import fit_basis
from logitcache.cache.encodings.dense import Dense
from logitcache.cache.encodings.fitted_transform import FittedTransform
from logitcache.cache.encodings.measure import Errors, measure, stored_bytes
from logitcache.cache.encodings.top_k import PackedTopK
from logitcache.cache.encodings.transform import Transform
from logitcache.cache.encodings.uint8 import UInt8
from logitcache.config.recipe import Positive
from logitcache.errors import RecipeError

HELD_OUT = 4
MOST_JUDGED = 1024
LARGEST_STEP, OCTAVES, PER_OCTAVE = 4.0, 8, 4
CORRECTIONS = (16, 64)


class Choice(NamedTuple):
    """An encoding that meets the budget, its stored bytes per row, and its errors on the rows held out."""

    encoding: Transform | PackedTopK | UInt8 | Dense
    num_bytes: float
    errors: Errors


class Auto(LogitsEncoding):
    """The smallest of `packed_top_k`, `transform`, `uint8` and `dense` whose error is within a bound.

    The error is the mean KL(full ‖ decoded) on a quarter of the calibration images; encodings are fitted to the others.
    Sizes are those of compressed chunks.
    """

    kind: Literal["auto"] = "auto"
    max_kl: Positive = Field(description="Largest mean KL(teacher ‖ decoded) in nats.", examples=[0.002])
    temperature: Positive = Field(
        default=1.0, description="Temperature of the KL divergence; set that of the student's loss."
    )
    storage: Literal["packed"] = Field(
        default="packed", description="Always packed: compressed with zstd, and read a shard at a time."
    )

    @property
    def temperature_of_errors(self) -> float:
        """The temperature of the budget."""
        return self.temperature

    def largest(self, network: nn.Module, num_classes: int) -> Dense:
        """Return the largest form that `fitted` may choose."""
        return Dense(dtype="float32", storage="packed")

    def fitted(self, sample: CalibrationSample) -> FittedTransform | PackedTopK | UInt8 | Dense:
        """Choose by the rows of a sample, and fit to them."""
        return self.fit(sample.logits, sample.images, sample.num_rows)

    def fit(
        self, logits: Tensor, images: Tensor | None = None, num_rows: int | None = None
    ) -> FittedTransform | PackedTopK | UInt8 | Dense:
        """Choose by calibration logits [N, C], and fit to all of them; see `choose`."""
        encoding = self.choose(logits, images, num_rows)[0].encoding
        return encoding.fit(logits, images) if isinstance(encoding, Transform) else encoding

    def choose(self, logits: Tensor, images: Tensor | None = None, num_rows: int | None = None) -> list[Choice]:
        """Return what meets the budget, the smallest first; `num_rows` of the whole cache share the bytes of tables.

        logits: [N, C]; images: [N] numbers the image that each row is a view of. Raises RecipeError for fewer than
        `HELD_OUT` images.
        """
        numbers = torch.arange(len(logits)) if images is None else images
        numbers = torch.unique(numbers.to(logits.device), return_inverse=True)[1]
        judged = numbers % HELD_OUT == HELD_OUT - 1
        if not bool(judged.any()):
            raise RecipeError(
                f"kind: auto cannot choose by {len(logits)} rows of {int(numbers.max()) + 1} images. "
                f"Fix: {HELD_OUT} calibration images or more, or name the encoding"
            )
        held_out = judged.nonzero()[:, 0]
        few = held_out[:: -(-len(held_out) // MOST_JUDGED)]  # rows come by view and image: from all over
        trial = _Trial(self, logits[~judged], logits[few], numbers[~judged], num_rows)
        # Float32 logits as they are meet every budget.
        return sorted(trial.choices(), key=lambda choice: choice.num_bytes)


class _Trial:
    """Candidates on trial: fitted on some rows, judged on others."""

    def __init__(self, budget: Auto, fitted: Tensor, judged: Tensor, images: Tensor, num_rows: int | None) -> None:
        self._budget, self._calibration, self._judged, self._num_rows = budget, fitted, judged, num_rows
        self._basis = fit_basis(fitted, images)

    def choices(self) -> Iterator[Choice]:
        """Yield of each family the smallest member that meets the budget."""
        num_classes = self._judged.shape[1]
        yield from self._first(num_classes, lambda number: PackedTopK(k=number + 1))
        for corrections in CORRECTIONS:
            yield from self._first(OCTAVES * PER_OCTAVE, _transforms(min(corrections, num_classes)))
        plain = (UInt8(storage="packed"), Dense(storage="packed"), Dense(dtype="float32", storage="packed"))
        yield from self._first(len(plain), plain.__getitem__)

    def _first(self, count: int, member: Callable[[int], Transform | PackedTopK | UInt8 | Dense]) -> Iterator[Choice]:
        """Yield the first of `count` members, whose errors fall and whose bytes grow, that meets the budget."""
        low, high, best = 0, count, None
        while low < high:
            middle = (low + high) // 2
            choice = self._judge(member(middle))
            if choice.errors.mean <= self._budget.max_kl:
                high, best = middle, choice
            else:
                low = middle + 1
        if best is not None:
            yield best

    def _judge(self, encoding: Transform | PackedTopK | UInt8 | Dense) -> Choice:
        tables, fitted = 0, encoding
        ready: LogitsCodec
        if isinstance(fitted, Transform):
            ready = fitted.with_basis(self._basis, self._calibration)
            tables = sum(table.nbytes for table in ready.tables.values())
        else:
            ready = fitted
        (errors,) = measure(ready, self._judged, [self._budget.temperature])
        num_bytes = stored_bytes(ready, self._judged) + (tables / self._num_rows if self._num_rows else 0)
        return Choice(encoding, num_bytes, errors)


def _transforms(corrections: int) -> Callable[[int], Transform]:
    """Return the ladder of transforms, the coarsest first."""
    return lambda number: Transform(step=LARGEST_STEP * 2 ** (-number / PER_OCTAVE), corrections=corrections)
