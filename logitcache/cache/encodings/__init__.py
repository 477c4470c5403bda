"""Encodings: two-way maps between a teacher's logits and named arrays; a new one joins the union on the last line."""

from typing import Annotated

from pydantic import Field

from logitcache.cache.encodings.base import RowArray
from logitcache.cache.encodings.dense import Dense
from logitcache.cache.encodings.top_k import TopK

__all__ = ["Dense", "Encoding", "RowArray", "TopK"]

Encoding = Annotated[Dense | TopK, Field(discriminator="kind")]
