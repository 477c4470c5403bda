"""Losses: pure functions for anyone's loop, and their recipe entries.

A new loss is a function and a component in a file of its own, added to the union on the last line. A component says
what it `needs` of labels and logits, which `features` of a teacher and which `taps` of the student it looks at, what it
trains beside the student (`adapter`), and whether it is a mean over rows (`by_row`): the parts of a batch then sum to
the whole.
"""

from typing import Annotated

from pydantic import Field

from logitcache.student.losses.attention_transfer import AttentionTransfer, attention_transfer
from logitcache.student.losses.binary_cross_entropy import BinaryCrossEntropy, binary_cross_entropy
from logitcache.student.losses.cka import CKA, cka
from logitcache.student.losses.crd import CRD, ContrastiveMemory, crd
from logitcache.student.losses.cross_entropy import CrossEntropy, cross_entropy
from logitcache.student.losses.dist import DIST, dist
from logitcache.student.losses.dkd import DKD, dkd
from logitcache.student.losses.grad_cam import GradCAM, grad_cam
from logitcache.student.losses.hint import Hint, hint
from logitcache.student.losses.kl_divergence import KLDivergence, kl_divergence, standardize
from logitcache.student.losses.mean_squared_error import MeanSquaredError, mean_squared_error
from logitcache.student.losses.multi_label_kl import MultiLabelKL, multi_label_kl
from logitcache.student.losses.nkd import NKD, nkd
from logitcache.student.losses.pkt import PKT, pkt
from logitcache.student.losses.rkd import RKD, rkd
from logitcache.student.losses.similarity import Similarity, similarity
from logitcache.student.losses.srrl import SRRL, softmax_regression
from logitcache.student.losses.vid import VID, vid
from logitcache.student.losses.wsld import WSLD, wsld

__all__ = [
    "CKA",
    "CRD",
    "DIST",
    "DKD",
    "NKD",
    "PKT",
    "RKD",
    "SRRL",
    "VID",
    "WSLD",
    "AttentionTransfer",
    "BinaryCrossEntropy",
    "ContrastiveMemory",
    "CrossEntropy",
    "GradCAM",
    "Hint",
    "KLDivergence",
    "Loss",
    "MeanSquaredError",
    "MultiLabelKL",
    "Similarity",
    "attention_transfer",
    "binary_cross_entropy",
    "cka",
    "crd",
    "cross_entropy",
    "dist",
    "dkd",
    "grad_cam",
    "hint",
    "kl_divergence",
    "mean_squared_error",
    "multi_label_kl",
    "nkd",
    "pkt",
    "rkd",
    "similarity",
    "softmax_regression",
    "standardize",
    "vid",
    "wsld",
]

Loss = Annotated[
    KLDivergence
    | CrossEntropy
    | MeanSquaredError
    | DKD
    | NKD
    | WSLD
    | DIST
    | MultiLabelKL
    | BinaryCrossEntropy
    | AttentionTransfer
    | CKA
    | CRD
    | GradCAM
    | Hint
    | PKT
    | RKD
    | Similarity
    | SRRL
    | VID,
    Field(discriminator="kind"),
]
