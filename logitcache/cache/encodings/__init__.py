"""Encodings: two-way maps between logits or features and named arrays; see `base` for what each declares."""

from typing import Annotated

from pydantic import Field

from logitcache.cache.encodings.auto import Auto
from logitcache.cache.encodings.dense import Dense
from logitcache.cache.encodings.fitted_transform import TransformForm
from logitcache.cache.encodings.head import Head, HeadForm
from logitcache.cache.encodings.top_k import PackedTopK, TopK
from logitcache.cache.encodings.transform import Transform
from logitcache.cache.encodings.uint8 import UInt8

__all__ = ["Encoding", "Form", "Simple"]

Simple = Dense | TopK | PackedTopK | UInt8
"""Encodings that need no fitting; a new one joins here."""

Encoding = Annotated[Simple | Transform | Auto | Head, Field(discriminator="kind")]
"""What a recipe may ask for."""

Form = Annotated[Simple | TransformForm | HeadForm, Field(discriminator="kind")]
"""The stored forms of logits that a manifest may name."""
