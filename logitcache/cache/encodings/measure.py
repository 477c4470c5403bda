"""What an encoding costs: bytes as they are stored, and divergence from the logits as they were."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numcodecs import Zstd
from numpy.typing import NDArray
from torch import Tensor

from logitcache.cache.encodings.base import LogitsCodec
from logitcache.cache.format.arrays import ZSTD_LEVELS, Order
from logitcache.logits import Logits, log_probs

QUANTILE = 0.999


class Errors(NamedTuple):
    """KL(full ‖ decoded) in nats over all rows, at a temperature."""

    temperature: float
    mean: float
    p999: float
    max: float


class ErrorMeter:
    """The divergences of all rows, gathered batch by batch: 4 bytes per row and temperature."""

    def __init__(self, temperatures: Sequence[float]) -> None:
        self._rows: dict[float, list[NDArray[np.float32]]] = {temperature: [] for temperature in temperatures}

    def add(self, logits: Tensor, decoded: Logits) -> None:
        """Count a batch of logits [B, C] and what became of them."""
        for temperature, rows in self._rows.items():
            rows.append(divergences(logits, decoded, temperature).float().cpu().numpy())

    def errors(self) -> list[Errors]:
        """Return the errors at each temperature. Raises ValueError before the first row."""
        gathered = {temperature: np.concatenate(rows) for temperature, rows in self._rows.items()}
        return [
            Errors(at, float(rows.mean(dtype=np.float64)), float(np.quantile(rows, QUANTILE)), float(rows.max()))
            for at, rows in gathered.items()
        ]


def divergences(logits: Tensor, decoded: Logits, temperature: float) -> Tensor:
    """Return KL(softmax(z / T) ‖ decoded) of each row, [B], not below zero; logits [B, C]."""
    full = torch.log_softmax(logits.float() / temperature, dim=1)
    kept = log_probs(decoded, temperature)
    difference, p = full - kept, full.exp()
    # Σ p d and Σ p (e^-d - 1 + d) agree where both are distributions. The second keeps the digits of small divergences;
    # p e^-d is q, which does not overflow.
    small = p * _excess(difference.clamp(-0.5, 0.5))
    return torch.where(difference.abs() < 0.5, small, kept.exp() - p + p * difference).sum(dim=1).clamp(min=0)


def _excess(x: Tensor) -> Tensor:
    """Return e^-x - 1 + x of |x| ≤ 1/2 by its Taylor series, x²/2 (1 - x/3 (1 - x/4 (…))), where nothing cancels."""
    one = total = x.new_ones(())
    for k in range(8, 2, -1):
        total = torch.addcmul(one, x, total, value=-1 / k)
    return x * x * total / 2


def stored(fitted: LogitsCodec, logits: Tensor) -> dict[str, NDArray[Any]]:
    """Return the arrays of logits [B, C] as they are stored."""
    encoded = fitted.encode(logits)
    return {row.suffix: encoded[row.suffix].cpu().numpy().astype(row.dtype) for row in fitted.arrays(logits.shape[1])}


def measure(fitted: LogitsCodec, logits: Tensor, temperatures: Sequence[float], batch_size: int = 1024) -> list[Errors]:
    """Return the errors over logits [N, C], encoded, cast to the stored dtypes and decoded."""
    meter = ErrorMeter(temperatures)
    for batch in torch.split(logits, batch_size):
        arrays = stored(fitted, batch)
        rows = {name: torch.from_numpy(values).to(batch.device) for name, values in arrays.items()}
        meter.add(batch, fitted.decode(rows, batch.shape[1]))
    return meter.errors()


def stored_bytes(fitted: LogitsCodec, logits: Tensor) -> float:
    """Return the bytes per row that logits [N, C] take in one chunk of packed storage, which zstd may make longer."""
    rows = fitted.arrays(logits.shape[1])
    arrays = stored(fitted, logits)
    return sum(chunk_bytes(arrays[row.suffix], row.order) for row in rows) / len(logits)


def chunk_bytes(rows: NDArray[Any], order: Order) -> int:
    """Return the bytes of rows [N, ...] in one chunk of packed storage."""
    chunk = np.moveaxis(rows, 0, -1) if order == "component" else rows
    return len(Zstd(level=ZSTD_LEVELS[order], checksum=True).encode(np.ascontiguousarray(chunk).tobytes()))
