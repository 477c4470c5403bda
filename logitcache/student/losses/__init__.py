"""Losses: pure functions for anyone's loop, and their recipe entries.

A new loss is a function and a component in a file of its own, added to the union on the last line.
"""

from typing import Annotated

from pydantic import Field

from logitcache.student.losses.cross_entropy import CrossEntropy, cross_entropy
from logitcache.student.losses.kl_divergence import KLDivergence, kl_divergence
from logitcache.student.losses.mean_squared_error import MeanSquaredError, mean_squared_error

__all__ = [
    "CrossEntropy",
    "KLDivergence",
    "Loss",
    "MeanSquaredError",
    "cross_entropy",
    "kl_divergence",
    "mean_squared_error",
]

Loss = Annotated[KLDivergence | CrossEntropy | MeanSquaredError, Field(discriminator="kind")]
