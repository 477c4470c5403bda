"""Encodings: two-way maps between a teacher's logits and named arrays; a new one joins a union at the end.

An encoding that is fitted (`transform`, `auto`) has `fit`; what it returns encodes and decodes as the others do.
"""

from typing import Annotated

from pydantic import Field

from logitcache.cache.encodings.auto import Auto
from logitcache.cache.encodings.base import RowArray
from logitcache.cache.encodings.dense import Dense
from logitcache.cache.encodings.fitted_transform import FittedTransform, TransformForm
from logitcache.cache.encodings.packed_top_k import PackedTopK
from logitcache.cache.encodings.top_k import TopK
from logitcache.cache.encodings.transform import Transform
from logitcache.cache.encodings.uint8 import UInt8

__all__ = [
    "Auto",
    "Dense",
    "Encoding",
    "FittedTransform",
    "PackedTopK",
    "RowArray",
    "TopK",
    "Transform",
    "TransformForm",
    "UInt8",
]

Encoding = Annotated[Dense | TopK | PackedTopK | UInt8, Field(discriminator="kind")]
