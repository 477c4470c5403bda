"""Ranks: the processes that train together, as torchrun starts them."""

import itertools
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from logitcache.errors import LogitCacheError, RecipeError
from logitcache.runtime.console import silenced
from logitcache.runtime.device import distributed_backend, make_current
from logitcache.runtime.stopping import StopFlag

T = TypeVar("T")

# The others wait while the first one reads or writes.
LONGEST_WAIT = timedelta(hours=1)
_meetings = itertools.count()


@dataclass(frozen=True)
class Ranks:
    """This process, `rank` of `size`; alone by default, and no method then exchanges anything.

    The methods that exchange anything are for all ranks together, in the same order.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and messages."""
        return self.rank == 0

    def use(self, device: torch.device) -> None:
        """Make a device the one that this process computes on; raises RecipeError if ranks cannot share its kind."""
        if self.size == 1:
            return
        if device.type == "mps":
            raise RecipeError(f"device 'mps' cannot serve {self.size} processes. Fix: device: cpu, or one process")
        make_current(device)

    def own_seed(self, seed: int) -> int:
        """Return the seed of what ranks must draw each for themselves, as dropout does."""
        return int(np.random.SeedSequence((seed, self.rank)).generate_state(1, np.uint64)[0] >> np.uint64(1))

    def wrapped(self, module: nn.Module) -> nn.Module:
        """Return a module whose gradients are the mean over ranks after a backward pass."""
        if self.size == 1:
            return module
        # If nothing is unused, DDP warns on stderr at every start.
        module.register_parameter("unused", nn.Parameter(next(module.parameters()).new_zeros(1)))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # older releases have no other name
            # A loss on features alone leaves parameters unused. To look for them also keeps the buckets as they are:
            # DDP would else lay them out again after a first step, and a resumed run would add up in another order.
            # Of statistics of normalisation each rank has its own; the first one's are measured and kept.
            return DistributedDataParallel(module, find_unused_parameters=True, broadcast_buffers=False)

    def exchanging(self, module: nn.Module, exchanges: bool) -> AbstractContextManager[None]:
        """Have the backward pass within the block exchange the gradients of a wrapped module, or only add to them."""
        return nullcontext() if exchanges or self.size == 1 else module.no_sync()  # type: ignore[operator]

    def mean_rows(self, rows: Tensor) -> Tensor:
        """Return the mean over ranks of numbers of rows [L], of which all ranks together have at least one."""
        if self.size == 1:
            return rows.clamp(min=1)
        return self.add_up(rows.clone()).clamp(min=1) / self.size

    def add_up(self, values: Tensor) -> Tensor:
        """Add to a tensor, in place, those of the other ranks."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def take_firsts(self, values: Tensor) -> None:
        """Overwrite a tensor with that of the first rank."""
        if self.size > 1:
            sent = values.contiguous()
            dist.broadcast(sent, src=0)
            values.copy_(sent)

    def every(self, holds: bool) -> bool:
        """Return whether something holds on every rank."""
        flag = torch.tensor(int(not holds))
        return self.add_up(flag).item() == 0

    def agreed(self, stop: StopFlag) -> StopFlag:
        """Return a flag that is the same on all ranks: set once any of them was asked to stop."""
        if self.size == 1:
            return stop
        signum = torch.tensor(stop.signum or 0)
        dist.all_reduce(signum, dist.ReduceOp.MAX)
        # Another flag: this one may be set before it is read again, on this rank alone.
        agreed = StopFlag()
        agreed.signum = int(signum) or None
        return agreed

    def gathered(self, value: T) -> list[T]:
        """Return the values of all ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def rows_of_all(self, rows: Tensor, counts: list[int]) -> Tensor:
        """Return the rows [B, ...] of all ranks, in their order; `counts`: how many each has."""
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def by_first(self, function: Callable[[], T]) -> T:
        """Call a function on the first rank and give all what it returns; if it raises, the others end quietly."""
        if self.size == 1:
            return function()
        answer: list[Any] = [None, None]
        if self.is_first:
            try:
                answer[0] = function()
            except Exception as error:
                dist.broadcast_object_list([None, _exit_code(error)], src=0)
                raise
        dist.broadcast_object_list(answer, src=0)
        found, exit_code = answer
        if exit_code is not None:
            raise SystemExit(exit_code)
        return found  # type: ignore[no-any-return]


ALONE = Ranks()

_FREEING = 0.1
"""Seconds for gloo's threads to free the tensors of finished work.

In PyTorch 2.6 that takes Python's lock, which the end of a group holds while it waits for these threads.
"""


@contextmanager
def joined() -> Iterator[Ranks]:
    """Meet the other processes that torchrun started, for a block; a block within another finds them met.

    The first rank alone shows progress. Of the ranks that an error ends one shows it, the first to fail; in the others
    SystemExit ends the program.
    """
    if dist.is_available() and dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size())
        return
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    store, rank, size = _meet()
    # The other ranks' progress and warnings are the same as the first one's.
    with warnings.catch_warnings(), nullcontext() if rank == 0 else silenced():
        # Compiled models meet the named warning; the user can do nothing about it.
        warnings.filterwarnings("ignore", "" if rank else "Grad strides do not match bucket view strides")
        try:
            yield Ranks(rank, size)
            Ranks(rank, size).every(True)  # a rank that leaves early would cut off one that still listens
            if dist.get_backend() == "gloo":
                time.sleep(_FREEING)
        except Exception as error:
            shown, others_failed = _explained(error, rank, size), False
            with suppress(dist.DistError):  # the store ends with the process that kept it
                others_failed = store.add("failed", 1) > 1
            if others_failed:
                raise SystemExit(_exit_code(shown)) from error
            if shown is error:
                raise
            raise shown from error
    # After an error the process ends, and the group with it: NCCL might wait here for a rank that is gone.
    dist.destroy_process_group()


def _meet() -> tuple[Store, int, int]:
    """Connect the processes; returns what they keep notes in, this one's rank, and how many there are."""
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise RecipeError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} is not set. Fix: start the processes "
            "with torchrun, which sets all of these, or unset WORLD_SIZE for one process"
        )
    try:
        store, rank, size = next(rendezvous("env://"))
        store = PrefixStore(f"logitcache/{next(_meetings)}", store)
        dist.init_process_group(distributed_backend(), store=store, rank=rank, world_size=size, timeout=LONGEST_WAIT)
    except dist.DistError as cause:
        place, first_line = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}", str(cause).partition("\n")[0]
        raise RecipeError(
            f"rank {os.environ['RANK']} cannot meet the others at {place}: {first_line}. "
            "Fix: the address of the first machine, and a port of it that is open to the others"
        ) from cause
    return store, rank, size


def _exit_code(error: Exception) -> int:
    return error.exit_code if isinstance(error, LogitCacheError) else 1


def _explained(error: Exception, rank: int, size: int) -> Exception:
    """Explain a broken connection; leave every other error as it is."""
    broken = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())
    first_line = str(error).partition("\n")[0]
    lost = (
        f"rank {rank} lost another of the {size} processes that train together, which was killed or cut off: "
        f"{first_line}. Fix: start all of them again with --resume"
    )
    return LogitCacheError(lost) if broken else error
