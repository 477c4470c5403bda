"""Batch normalisation: by all rows of a batch, of which each of several ranks has a part, and over few steps."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from logitcache.errors import RecipeError
from logitcache.runtime.console import logger
from logitcache.student.distributed.ranks import Ranks

_UNSETTLED = 0.1
"""Share of the values before the first step, of which running averages should keep less."""

CONVERTED = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def require_shared_statistics(device: torch.device, ranks: Ranks) -> None:
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


def warn_of_unsettled(model: nn.Module, steps: int) -> None:
    """Warn if so many forward passes leave much of the values that running averages of a new model begin with.

    Evaluation normalises by these averages, and training by the batch: until they agree, a model that learns well
    measures like chance.
    """
    shares = [
        (1.0 - module.momentum) ** steps
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.momentum is not None and _is_new(module)
    ]
    if shares and max(shares) > _UNSETTLED:
        logger.warning(
            f"after {steps} steps, running averages of batch normalisation are still {100 * max(shares):.0f} % what "
            "they were before the first: accuracy will be measured far too low. Fix: more steps (epochs, smaller "
            "batches), pretrained weights, or layers of a higher momentum"
        )


def _is_new(module: _BatchNorm) -> bool:
    """Return whether the running averages are those that torch begins with."""
    mean, variance = module.running_mean, module.running_var
    return mean is not None and variance is not None and not bool(mean.any()) and bool((variance == 1).all())
