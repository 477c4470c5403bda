"""Encodings: two-way maps between what a teacher answers and named arrays; a new one joins a union at the end.

What a recipe asks for is fitted (`fitted`, which of most is the entry itself) and becomes a form, which the manifest
holds, and tables, which lie beside the rows. Both together encode and decode.
"""

from typing import Annotated

from pydantic import Field

from logitcache.cache.encodings.auto import Auto
from logitcache.cache.encodings.base import Coder, RowArray, Sample, Tables, TableShape
from logitcache.cache.encodings.dense import Dense
from logitcache.cache.encodings.features import Feature, FeatureForm, FittedFeature
from logitcache.cache.encodings.fitted_transform import FittedTransform, TransformForm
from logitcache.cache.encodings.head import Head, HeadForm
from logitcache.cache.encodings.packed_top_k import PackedTopK
from logitcache.cache.encodings.top_k import TopK
from logitcache.cache.encodings.transform import Transform
from logitcache.cache.encodings.uint8 import UInt8

__all__ = [
    "Auto",
    "Coder",
    "Dense",
    "Encoding",
    "Feature",
    "FeatureForm",
    "FittedFeature",
    "FittedTransform",
    "Form",
    "Head",
    "HeadForm",
    "PackedTopK",
    "RowArray",
    "Sample",
    "TableShape",
    "Tables",
    "TopK",
    "Transform",
    "TransformForm",
    "UInt8",
]

Encoding = Annotated[Dense | TopK | PackedTopK | UInt8 | Transform | Auto | Head, Field(discriminator="kind")]
"""What a recipe may ask for."""

Form = Annotated[Dense | TopK | PackedTopK | UInt8 | TransformForm | HeadForm, Field(discriminator="kind")]
"""What a manifest may say of how logits are kept."""
