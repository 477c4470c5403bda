"""Sources to derive from, and recipes that do."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from logitcache.cache.cache import Cache, open_cache
from logitcache.config.recipe import load_recipe
from logitcache.logits import dense_logits
from logitcache.stage_one.derive.derive import DeriveRecipe
from logitcache.stage_one.precompute import precompute
from logitcache.views.keys import ViewKey
from tests.cache.made import DENSE32, Linear, Pixels, recipe, teacher

COUNT, CLASSES, SHARD_ROWS = 300, 16, 128


def source(path: Path, entries: Mapping[str, Any] | None = None, count: int = COUNT, **changes: Any) -> Path:
    """Fill a cache of two linear teachers, `a` and `b`, which keep float32 logits unless `entries` says otherwise."""
    kept = entries or {"a": teacher(DENSE32), "b": teacher(DENSE32)}
    plan = recipe(path, **({"teachers": kept, "shard_rows": SHARD_ROWS} | changes))
    modules = {name: Linear(CLASSES, seed=number) for number, name in enumerate(kept)}
    precompute(plan, teachers=modules, dataset=Pixels(count, CLASSES))
    return path


def derivation(cache: Path, out: Path, teachers: Mapping[str, Any], **changes: Any) -> DeriveRecipe:
    entries = {"cache": str(cache), "out": str(out), "teachers": dict(teachers), "device": "cpu"}
    return load_recipe(entries | changes, DeriveRecipe)


def keys(cache: Cache) -> list[ViewKey]:
    return [ViewKey(view, index) for view in range(cache.num_views) for index in range(len(cache))]


def stored(path: Path, name: str) -> torch.Tensor:
    """Return all logits of a teacher as float32, [V * N, C]."""
    cache = open_cache(path)
    return dense_logits(cache.answers(keys(cache))[name]).float()


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    values = np.exp(logits - logits.max(axis=1, keepdims=True))
    found: NDArray[np.float64] = values / values.sum(axis=1, keepdims=True)
    return found
