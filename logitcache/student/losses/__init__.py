"""Losses: pure functions for anyone's loop, and their recipe entries.

A new loss is a function and a component in a file of its own, added to the union on the last line. A component says
what it `needs`, and whether it is a mean over rows (`by_row`): the parts of a batch then sum to the whole.
"""

from typing import Annotated

from pydantic import Field

from logitcache.student.losses.cross_entropy import CrossEntropy, cross_entropy
from logitcache.student.losses.dist import DIST, dist
from logitcache.student.losses.dkd import DKD, dkd
from logitcache.student.losses.kl_divergence import KLDivergence, kl_divergence, standardize
from logitcache.student.losses.mean_squared_error import MeanSquaredError, mean_squared_error
from logitcache.student.losses.multi_label_kl import MultiLabelKL, multi_label_kl
from logitcache.student.losses.nkd import NKD, nkd
from logitcache.student.losses.wsld import WSLD, wsld

__all__ = [
    "DIST",
    "DKD",
    "NKD",
    "WSLD",
    "CrossEntropy",
    "KLDivergence",
    "Loss",
    "MeanSquaredError",
    "MultiLabelKL",
    "cross_entropy",
    "dist",
    "dkd",
    "kl_divergence",
    "mean_squared_error",
    "multi_label_kl",
    "nkd",
    "standardize",
    "wsld",
]

Loss = Annotated[
    KLDivergence | CrossEntropy | MeanSquaredError | DKD | NKD | WSLD | DIST | MultiLabelKL,
    Field(discriminator="kind"),
]
