"""What an encoding of logits declares. A new one is a class in a file of its own, and a line of `Simple` in `__init__`.

A simple encoding, which needs no fitting, subclasses `Plain`: the entry of a recipe is the form that the manifest
stores, and both directions of the map. One that is fitted to a teacher has three classes: a `LogitsEncoding`, which
the recipe asks for and `fitted` turns into a `Fitted` codec, whose `LogitsForm` and tables the cache stores; the first
joins `Encoding`, the form joins `Form`. Fields are part of the format: they are never renamed or reordered, and later
ones have defaults that leave the stored form as it was (`config.recipe.Extended`).
"""

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from logitcache.cache.format.arrays import Floats, Order
from logitcache.classifier import Classifier
from logitcache.config.recipe import Component
from logitcache.logits import Logits
from logitcache.targets import Targets


class RowArray(NamedTuple):
    """One array of an encoding: the shape and type of a row.

    `floats`: items of an integer row that are floats; readers refuse NaN and infinity there.
    """

    suffix: str
    shape: tuple[int, ...]
    dtype: str
    dims: tuple[str, ...]
    order: Order = "sample"
    floats: tuple[Floats, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Bytes of a row, uncompressed."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


Tables = Mapping[str, NDArray[Any]]
"""Arrays beside the rows that an encoding was fitted to or takes from the teacher, by name."""


class TableShape(NamedTuple):
    """Shape and dtype of a table."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class LogitsCodec(Protocol):
    """Both directions of an encoding's map, ready to use, and the form and tables that rebuild it."""

    @property
    def form(self) -> "LogitsForm":
        """The form that the manifest stores."""

    @property
    def tables(self) -> Tables:
        """The tables that the cache stores beside the rows."""

    def arrays(self, num_classes: int) -> tuple[RowArray, ...]:
        """List the arrays that a row of `num_classes` logits takes."""

    def encode(self, logits: Tensor) -> dict[str, Tensor]:
        """Encode logits [B, C] into arrays by suffix, of the dtypes and shapes that `arrays` lists."""

    def decode(self, rows: dict[str, Tensor], num_classes: int) -> Logits:
        """Return the logits, or a compact form that becomes them on the device."""


class CalibrationSample(Protocol):
    """A teacher, and its answers to some views, which are computed when they are used."""

    @property
    def classifier(self) -> Classifier:
        """The teacher: its network, and which of the outputs are its classes."""

    @property
    def logits(self) -> Tensor:
        """Logits [N, C] on the CPU."""

    @property
    def images(self) -> Tensor:
        """The image that each row is a view of, int64 [N]."""

    @property
    def examples(self) -> Targets:
        """Answers to a few views, with all features."""

    @property
    def num_rows(self) -> int:
        """Rows of the whole cache."""


class LogitsEncoding(Component):
    """An encoding as a recipe asks for it; its fields are `kind`, a Literal, and its options."""

    measured: ClassVar[bool] = True
    """Only for manifests of the first release: whether they record errors for this encoding. New encodings leave it."""

    @property
    def temperature_of_errors(self) -> float:
        """A temperature at which the errors of its rows are recorded, beside those of all encodings."""
        return 1.0

    def features(self, network: nn.Module) -> dict[str, Any]:
        """Return the features (`Feature` by name) that are stored for it: none."""
        return {}

    @abstractmethod
    def largest(self, network: nn.Module, num_classes: int) -> "LogitsForm":
        """Return the largest form that `fitted` may choose, for upper bounds of sizes."""

    @abstractmethod
    def fitted(self, sample: CalibrationSample) -> LogitsCodec:
        """Fit to a sample."""


class LogitsForm(Component):
    """An encoding as a manifest stores it; its fields are `kind` and `storage` ("hot" or "packed"), and its options."""

    gives: ClassVar[frozenset[str]]
    """The needs of losses that it meets: "logits" if all classes get a log-probability, "raw logits" if logits."""

    table_names: ClassVar[frozenset[str]] = frozenset()
    """Every name that `table_shapes` may return."""

    any_bits: ClassVar[bool] = True
    """Whether every row of finite floats is an answer; if not, `wrong_row` looks at all rows that are read."""

    @property
    def exact(self) -> bool:
        """Whether float32 logits are decoded as they were."""
        return False

    @property
    def needs(self) -> Mapping[str, int]:
        """The features that it is decoded from, and the width of their vectors."""
        return {}

    @abstractmethod
    def arrays(self, num_classes: int) -> tuple[RowArray, ...]:
        """List the arrays that a row of `num_classes` logits takes; raise RecipeError for options that do not fit."""

    def table_shapes(self, num_classes: int) -> dict[str, TableShape]:
        """List the tables: none."""
        return {}

    @abstractmethod
    def ready(self, tables: Tables) -> LogitsCodec:
        """Rebuild the codec from its tables."""

    def wrong_row(self, rows: Mapping[str, Tensor], decoded: Logits) -> tuple[int, str] | None:
        """Return the first of the rows [B, ...] that stand for no logits, and what it does, as "holds NaN"; else None.

        Only called if `any_bits` is False: by `verify`, and of every batch that is read.
        """
        return None


class Plain(LogitsEncoding, LogitsForm):
    """An encoding that needs no fitting: it is its own form and codec."""

    tables: ClassVar[Tables] = {}

    @property
    def form(self) -> Self:
        """Return itself."""
        return self

    def largest(self, network: nn.Module, num_classes: int) -> Self:
        """Return itself."""
        return self

    def fitted(self, sample: CalibrationSample) -> Self:
        """Return itself."""
        return self

    def ready(self, tables: Tables) -> Self:
        """Return itself."""
        return self

    @abstractmethod
    def encode(self, logits: Tensor) -> dict[str, Tensor]:
        """Encode logits [B, C]."""

    @abstractmethod
    def decode(self, rows: dict[str, Tensor], num_classes: int) -> Logits:
        """Return the logits, or a compact form that becomes them on the device."""


@dataclass(frozen=True, eq=False)
class Fitted:
    """A form with its tables, which are copied to each device once."""

    form: Any
    tables: Tables = field(repr=False)
    _placed: dict[torch.device, dict[str, Tensor]] = field(init=False, default_factory=dict, repr=False)

    def arrays(self, num_classes: int) -> tuple[RowArray, ...]:
        """List the arrays that a row of `num_classes` logits takes."""
        found: tuple[RowArray, ...] = self.form.arrays(num_classes)
        return found

    def _tensors(self) -> dict[str, Tensor]:
        """Return what decoding uses, on the CPU: the tables."""
        return {name: torch.from_numpy(np.array(values)) for name, values in self.tables.items()}

    def _on(self, device: torch.device) -> dict[str, Tensor]:
        """Return the same on a device."""
        if device not in self._placed:
            self._placed[device] = {name: values.to(device) for name, values in self._tensors().items()}
        return self._placed[device]
