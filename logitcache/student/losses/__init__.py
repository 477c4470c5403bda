# ruff: noqa: I001  # one import a loss
"""Losses: pure functions for any training loop, and their recipe entries.

A new loss is a function and a component in a file of its own; import both here and add the component to the union.
`LossBase` documents what a component declares.
"""

from typing import Annotated

from pydantic import Field

from logitcache.student.losses.attention_transfer import (
    AttentionTransfer as AttentionTransfer,
    attention_transfer as attention_transfer,
)
from logitcache.student.losses.binary_cross_entropy import (
    BinaryCrossEntropy as BinaryCrossEntropy,
    binary_cross_entropy as binary_cross_entropy,
)
from logitcache.student.losses.cka import CKA as CKA, cka as cka
from logitcache.student.losses.crd import CRD as CRD, ContrastiveMemory as ContrastiveMemory, crd as crd
from logitcache.student.losses.cross_entropy import CrossEntropy as CrossEntropy, cross_entropy as cross_entropy
from logitcache.student.losses.dist import DIST as DIST, dist as dist
from logitcache.student.losses.dkd import DKD as DKD, dkd as dkd
from logitcache.student.losses.grad_cam import GradCAM as GradCAM, grad_cam as grad_cam
from logitcache.student.losses.hint import Hint as Hint, hint as hint
from logitcache.student.losses.kl_divergence import (
    KLDivergence as KLDivergence,
    kl_divergence as kl_divergence,
    standardize as standardize,
)
from logitcache.student.losses.mean_squared_error import (
    MeanSquaredError as MeanSquaredError,
    mean_squared_error as mean_squared_error,
)
from logitcache.student.losses.multi_label_kl import MultiLabelKL as MultiLabelKL, multi_label_kl as multi_label_kl
from logitcache.student.losses.nkd import NKD as NKD, nkd as nkd
from logitcache.student.losses.pkt import PKT as PKT, pkt as pkt
from logitcache.student.losses.rkd import RKD as RKD, rkd as rkd
from logitcache.student.losses.similarity import Similarity as Similarity, similarity as similarity
from logitcache.student.losses.srrl import SRRL as SRRL, softmax_regression as softmax_regression
from logitcache.student.losses.vid import VID as VID, vid as vid
from logitcache.student.losses.wsld import WSLD as WSLD, wsld as wsld

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
