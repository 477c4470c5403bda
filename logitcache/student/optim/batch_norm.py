"""Batch normalisation by all rows of a batch, of which each of several ranks has a part."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from logitcache.errors import RecipeError
from logitcache.student.ranks import Ranks

CONVERTED = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def require_possible(device: torch.device, ranks: Ranks) -> None:
    """Raise RecipeError if ranks compute on devices that cannot share statistics."""
    if ranks.size > 1 and device.type != "cuda":
        raise RecipeError(
            f"sync_batch_norm is torch.nn.SyncBatchNorm, which needs CUDA devices; these {ranks.size} processes are on "
            f"device {device.type!r}. Fix: sync_batch_norm: false (each process normalises its part of a batch), one "
            "process, or machines with a GPU for each process"
        )


def synchronize(model: nn.Module, ranks: Ranks) -> None:
    """Have the layers of a model share statistics, in place; the names of its weights stay.

    Raises RecipeError for layers that do more than torch's own, as theirs would be lost.
    """
    if ranks.size == 1:
        return
    others = {
        name: type(module).__name__
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and type(module) not in CONVERTED
    }
    if others:
        raise RecipeError(
            f"sync_batch_norm replaces layers of torch alone, the model has others that normalise by batch: {others}. "
            "Fix: sync_batch_norm: false, or a model of nn.BatchNorm1d, 2d and 3d"
        )
    nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
