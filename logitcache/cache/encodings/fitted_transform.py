"""The stored form of a transform: its arrays, and both directions of its map."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from logitcache.cache.encodings.base import Fitted, LogitsForm, RowArray, Tables, TableShape
from logitcache.cache.encodings.basis import compand, expand
from logitcache.cache.encodings.bits import pack_digits, unpack_digits
from logitcache.cache.encodings.trellis import bits, half_steps, middle, quantise, recurrence, shrinkage
from logitcache.config.recipe import Positive
from logitcache.errors import RecipeError, RowError
from logitcache.logits import CompactLogits, Logits


class Packing(NamedTuple):
    """Whole numbers up to `limit` in an array of `dtype`, of a byte as `each` digits to a base; see `bits`."""

    suffix: str
    dtype: str
    limit: int
    base: int = 0
    each: int = 1


WIDE, BYTE = Packing("wide", "int16", 32767), Packing("byte", "int8", 127)
PAIR, TRIPLE = Packing("pair", "uint8", 7, 16, 2), Packing("triple", "uint8", 2, 6, 3)
QUINT = Packing("quint", "uint8", 1, 3, 5)
MEAN_LIMIT = 32767
EXACT = 2**24
"""Sums of integers below it are exact in float32, in any order."""

MAX_EXPONENT = 20
MEAN_UNIT = 1 / 16
DEAD_ZONE = 0.05
Number = Field(default=0, ge=0)


class TransformForm(LogitsForm):
    """What, with its tables, rebuilds a fitted transform.

    Of the coefficients the first `wide` take two bytes, `bytes` one, and of the others two, three or five share one;
    the last, `quints`, are rounded each by itself. Two corrections share a byte after the first `correction_bytes`.
    """

    gives: ClassVar[frozenset[str]] = frozenset({"logits", "raw logits"})
    table_names: ClassVar[frozenset[str]] = frozenset({"basis", "centre", "deviation", "correction_step"})

    kind: Literal["transform"] = "transform"
    storage: Literal["packed"] = "packed"
    step: Positive
    bend: Positive
    wide: int = Number
    bytes: int = Number
    pairs: int = Number
    triples: int = Number
    quints: int = Field(ge=0)
    correction_bytes: int = Number
    corrections: int = Number

    @property
    def coupled(self) -> int:
        """Coefficients of a row that the trellis couples, the first ones."""
        return self.wide + self.bytes + self.pairs + self.triples

    @property
    def num_coefficients(self) -> int:
        """Coefficients of a row."""
        return self.coupled + self.quints

    @property
    def coefficient_parts(self) -> tuple["Part", ...]:
        """How the coefficients are stored, in their order."""
        counts = (self.wide, self.bytes, self.pairs, self.triples, self.quints)
        return _parts("", zip((WIDE, BYTE, PAIR, TRIPLE, QUINT), counts, strict=True))

    @property
    def correction_parts(self) -> tuple["Part", ...]:
        """How the corrections are stored, the largest logit's first."""
        return _parts("top_", ((BYTE, self.correction_bytes), (PAIR, self.corrections - self.correction_bytes)))

    def arrays(self, num_classes: int) -> tuple[RowArray, ...]:
        """List the arrays that a row of `num_classes` logits takes; raises RecipeError for more numbers than these."""
        if max(self.num_coefficients, self.corrections) > num_classes or self.correction_bytes > self.corrections:
            raise RecipeError(f"a transform of {num_classes} classes cannot have {self!r}")
        rows = [
            RowArray(name, (-(-count // size.each),), size.dtype, (name,), "component")
            for name, size, count in (*self.coefficient_parts, *self.correction_parts)
        ]
        return (*rows, RowArray("mean", (), "int16", ()), RowArray("exponent", (), "uint8", ()))

    def table_shapes(self, num_classes: int) -> dict[str, TableShape]:
        """List the tables of a transform of `num_classes` logits; one that would be empty is left out."""
        shapes = {
            "basis": TableShape((self.num_coefficients, num_classes), "int16"),
            "centre": TableShape((num_classes,), "int32"),
            "deviation": TableShape((self.num_coefficients,), "float32"),
            "correction_step": TableShape((self.corrections,), "float32"),
        }
        return {name: shape for name, shape in shapes.items() if 0 not in shape.shape}

    def ready(self, tables: Tables) -> "FittedTransform":
        """Restore the transform from its tables."""
        return FittedTransform(self, tables)


@dataclass(frozen=True, eq=False)
class FittedTransform(Fitted):
    """A transform with its basis.

    tables: basis, int16 [K, C], in units of 2^-11; centre, int32 [C], in units of step · 2^-12; deviation, float32 [K],
    of the coefficients in half steps; correction_step, float32 [corrections], in companded logits, absent without
    corrections.
    """

    form: TransformForm

    def encode(self, logits: Tensor) -> dict[str, Tensor]:
        """Encode logits [B, C]. Raises RowError for a row that is not finite, or far beyond the calibration rows."""
        form, table = self.form, self._on(logits.device)
        mean = logits.float().mean(dim=1, keepdim=True)
        centred = logits.float() - mean
        near = self._coefficients(compand(centred, form.bend), table)
        is_far = self._exponent(near, compand(mean, form.bend), table)[:, None] > 0
        # Companding would take what is far beyond the calibration rows out of the few dimensions where they lie.
        mean, centred = (torch.where(is_far, value, compand(value, form.bend)) for value in (mean, centred))
        exact = self._coefficients(centred, table)
        exponent = torch.where(is_far[:, 0], self._exponent(exact, mean, table).clamp(min=1), 0)
        scale = torch.ldexp(torch.ones_like(mean), exponent[:, None])
        rounded = quantise(exact / scale, table["bits"], table["limits"], form.coupled)
        approximation, top = self._approximate(rounded, exponent, table)
        steps = table["correction_step"] * scale
        residual = (centred.gather(1, top) - approximation.gather(1, top)) / steps
        corrections = residual.sign() * (residual.abs() + 0.5 - DEAD_ZONE).floor()
        arrays = {
            **_split(rounded, form.coefficient_parts),
            **_split(corrections, form.correction_parts),
            "mean": (mean / (form.step * MEAN_UNIT * scale))[:, 0].round().to(torch.int16),
            "exponent": exponent.to(torch.uint8),
        }
        return {row.suffix: arrays[row.suffix] for row in self.arrays(logits.shape[1])}

    def decode(self, rows: dict[str, Tensor], num_classes: int) -> Logits:
        """Return the encoded form, which becomes float32 logits on the device."""
        return CompactLogits(rows, num_classes, self._logits)

    def _logits(self, rows: Mapping[str, Tensor]) -> Tensor:
        form, exponent = self.form, rows["exponent"].int()
        table = self._on(exponent.device)
        rounded = _joined(rows, form.coefficient_parts)
        approximation, top = self._approximate(rounded, exponent, table)
        scale = torch.ldexp(torch.ones_like(approximation[:, :1]), exponent[:, None])
        if form.corrections:
            corrections = _joined(rows, form.correction_parts)
            approximation = approximation.scatter_add(1, top, corrections * table["correction_step"] * scale)
        mean = rows["mean"].float()[:, None] * scale * (form.step * MEAN_UNIT)
        is_far = exponent[:, None] > 0
        mean, centred = (torch.where(is_far, value, expand(value, form.bend)) for value in (mean, approximation))
        return mean + centred

    def _coefficients(self, centred: Tensor, table: Mapping[str, Tensor]) -> Tensor:
        """Return the coefficients [B, K], in half steps, of logits less their mean [B, C], companded or not."""
        with torch.autocast(centred.device.type, enabled=False):
            exact = (centred / self._unit - table["centre"]) @ self._inverse(centred.device)
        return (exact + table["middle"]) * table["shrinkage"] - table["middle"]

    def _approximate(self, rounded: Tensor, exponent: Tensor, table: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return what coefficients [B, K] stand for, [B, C], and the classes to correct, the largest first.

        Everything that the order depends on is a whole number, and of equals the lower class comes first: encoder and
        decoder agree on every device.
        """
        with torch.autocast(rounded.device.type, enabled=False):
            sums = (half_steps(rounded, table["recurrence"]) @ table["basis"]).long()
        sums = (sums << exponent.long()[:, None]) + table["whole_centre"]
        num_classes = sums.shape[1]
        classes = torch.arange(num_classes, device=sums.device)
        order = (sums * num_classes - classes).topk(self.form.corrections, dim=1).indices
        return sums.float() * self._unit, order

    @property
    def _unit(self) -> float:
        """What one unit of the integer sums is in companded logits."""
        return self.form.step / 2 / 2**11

    def _exponent(self, exact: Tensor, mean: Tensor, table: Mapping[str, Tensor]) -> Tensor:
        """Return by which power of two each row's steps are longer, so that it fits: int32 [B], 0 but for outliers.

        A few of the coefficients that share a byte are cut, if they are so little beyond what it holds that this
        costs less than a tenth of the error of rounding.
        """
        form, size, limits = self.form, exact.abs() / 2, table["limits"]
        long, num = form.wide + form.bytes, form.num_coefficients
        excess = (size - limits - 0.5).clamp(min=0)[:, long:].square().sum(dim=1) > 0.1 * num / 12
        # By the Cauchy-Schwarz inequality no sum of products, in any order, is larger than the product of the norms;
        # a rounded number is at most two half steps larger.
        needed = [
            _largest((size / limits)[:, :long]),
            _largest((size / limits)[:, long:]) * excess,
            exact.norm(dim=1) / (EXACT / table["column_norm"] - 2 * num**0.5),
            mean[:, 0].abs() / (form.step * MEAN_UNIT * MEAN_LIMIT),
        ]
        ratio = torch.stack(needed).amax(dim=0)
        wrong = ~(ratio <= 2**MAX_EXPONENT)
        if bool(wrong.any()):
            raise RowError(
                int(wrong.int().argmax()),
                f"its logits are not finite, or more than 2^{MAX_EXPONENT} times as large as those that the transform "
                "was fitted to. Fix: kind: dense, or a teacher that is whole",
            )
        return (ratio * 1.01).clamp(min=1).log2().ceil().int()

    def _inverse(self, device: torch.device) -> Tensor:
        """Return the pseudo-inverse [C, K] of the basis: rounded to integers its vectors are not quite orthonormal."""
        table = self._on(device)
        if "inverse" not in table:
            basis = torch.from_numpy(self.tables["basis"].astype(np.float64))
            # Rows of zeros have no inverse; a little is nothing beside squares near 2^22.
            products = basis @ basis.T + torch.eye(len(basis), dtype=basis.dtype) * 1e-6
            table["inverse"] = torch.linalg.solve(products, basis).T.float().contiguous().to(device)
        return table["inverse"]

    def _tensors(self) -> dict[str, Tensor]:
        """Return the tables in float32, the centre as integers as well, and what follows from them."""
        table = {name: torch.from_numpy(values.astype(np.float32)) for name, values in self.tables.items()}
        table.setdefault("correction_step", torch.empty(0))
        coupled, deviation = self.form.coupled, table["deviation"]
        limits = [torch.full((count,), float(size.limit)) for _, size, count in self.form.coefficient_parts]
        return table | {
            "whole_centre": torch.from_numpy(self.tables["centre"].astype(np.int64)),
            "column_norm": table["basis"].norm(dim=0).max(),
            "bits": bits(deviation, coupled),
            "middle": middle(deviation, coupled),
            "shrinkage": shrinkage(deviation, coupled),
            "recurrence": recurrence(coupled, self.form.num_coefficients),
            "limits": torch.cat(limits),
        }


Part = tuple[str, Packing, int]
"""The name of an array, how numbers lie in it, and how many of a row."""


def _parts(prefix: str, counts: Iterable[tuple[Packing, int]]) -> tuple[Part, ...]:
    """Name the arrays that are not empty."""
    return tuple((prefix + size.suffix, size, count) for size, count in counts if count)


def _largest(values: Tensor) -> Tensor:
    """Return the largest of each row, 0 of none."""
    return values.amax(dim=1) if values.shape[1] else values.new_zeros(len(values))


def _split(values: Tensor, parts: tuple[Part, ...]) -> dict[str, Tensor]:
    """Cut integers [B, n] into arrays."""
    cut = torch.split(values, [count for _, _, count in parts], dim=1) if parts else ()
    return {name: _stored(numbers, size) for numbers, (name, size, _) in zip(cut, parts, strict=True)}


def _stored(numbers: Tensor, size: Packing) -> Tensor:
    lowest = -(size.base // 2) if size.base else -size.limit - 1
    held = numbers.clamp(lowest, size.limit)
    return pack_digits(held, size.base, size.each) if size.base else held.to(getattr(torch, size.dtype))


def _joined(rows: Mapping[str, Tensor], parts: tuple[Part, ...]) -> Tensor:
    """Return as float32 [B, n] what `_split` cut."""
    return torch.cat([_numbers(rows[name], size, count).float() for name, size, count in parts], dim=1)


def _numbers(stored: Tensor, size: Packing, count: int) -> Tensor:
    return unpack_digits(stored, size.base, size.each, count) if size.base else stored
