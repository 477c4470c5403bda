"""What every encoding shares."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from logitcache.config.recipe import Component
from logitcache.logits import Logits
from logitcache.models import Classifier
from logitcache.store.arrays import Floats, Order
from logitcache.targets import Targets


class RowArray(NamedTuple):
    """One array of an encoding: what it holds of each view of each image; `floats` lie in a row of whole numbers."""

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
"""What an encoding was fitted to, beside its rows, by name."""


class TableShape(NamedTuple):
    """Shape and dtype of a table."""

    shape: tuple[int, ...]
    dtype: str


class Coder(Protocol):
    """An encoding of logits that is ready: both directions of its map, and the form and tables that rebuild it."""

    @property
    def form(self) -> Component:
        """What the manifest says of it."""

    @property
    def tables(self) -> Tables:
        """What lies beside the rows."""

    def arrays(self, num_classes: int) -> tuple[RowArray, ...]:
        """List the arrays that a row of `num_classes` logits takes."""

    def encode(self, logits: Tensor) -> dict[str, Tensor]:
        """Encode logits [B, C]."""

    def decode(self, rows: dict[str, Tensor], num_classes: int) -> Logits:
        """Return the logits, or their encoded form."""


class Sample(Protocol):
    """What an encoding may be fitted to: a teacher, and its answers to some views, drawn when they are asked for."""

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


class Plain(Component):
    """An encoding that needs no fitting: its entry in a recipe is all there is to it."""

    measured: ClassVar[bool] = True
    temperature_of_errors: ClassVar[float] = 1.0
    needs: ClassVar[Mapping[str, int]] = {}
    tables: ClassVar[Tables] = {}

    @property
    def form(self) -> Self:
        """Return itself."""
        return self

    @property
    def exact(self) -> bool:
        """Whether float32 logits are decoded as they were."""
        return False

    def features(self, network: nn.Module) -> dict[str, Any]:
        """Return the features that are kept for it: none."""
        return {}

    def largest(self, network: nn.Module, num_classes: int) -> Self:
        """Return the form that takes most of those that `fitted` may choose: itself."""
        return self

    def fitted(self, sample: Sample) -> Self:
        """Return itself."""
        return self

    def table_shapes(self, num_classes: int) -> dict[str, TableShape]:
        """List the tables: none."""
        return {}

    def ready(self, tables: Tables) -> Self:
        """Return itself."""
        return self
