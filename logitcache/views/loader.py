"""Render batches of views, ahead of their use and in worker processes."""

import multiprocessing
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from logitcache.errors import DataError
from logitcache.stopping import ignore_signals
from logitcache.views.keys import ViewKey
from logitcache.views.spec import Views

StartMethod = Literal["fork", "spawn", "forkserver"]


class _Guarded:
    """Views whose errors are values: an exception would lose its type and gain a worker's traceback on its way."""

    def __init__(self, views: Views) -> None:
        self.views = views

    def __getitems__(self, keys: list[ViewKey]) -> Tensor | DataError:
        try:
            return self.views.__getitems__(keys)
        except DataError as error:
            return error


class _Batches:
    """The batch sampler of persistent workers: what the main process asks for next."""

    def __init__(self) -> None:
        self.batches: Iterable[list[ViewKey]] = ()

    def __iter__(self) -> Iterator[list[ViewKey]]:
        return iter(self.batches)


def _same(rendered: Tensor | DataError) -> Tensor | DataError:
    return rendered


def _start_worker(worker: int) -> None:
    ignore_signals()


class ViewLoader:
    """Render batches of keys with `num_workers` processes (0: in this one), `prefetch` batches ahead in each."""

    def __init__(
        self, views: Views, num_workers: int = 0, start_method: StartMethod = "forkserver", prefetch: int = 2
    ) -> None:
        options: dict[str, Any] = {}
        if num_workers:
            context = multiprocessing.get_context(start_method)
            if start_method == "forkserver":
                context.set_forkserver_preload([__name__])  # torch is imported once, not once a worker
            options = {"multiprocessing_context": context, "prefetch_factor": prefetch, "persistent_workers": True}
        self._sampler = _Batches()
        self._loader: DataLoader[Tensor | DataError] = DataLoader(
            _Guarded(views),  # type: ignore[arg-type]  # only `__getitems__` is used
            batch_sampler=self._sampler,  # of any length
            collate_fn=_same,  # type: ignore[arg-type]  # a rendered batch, not a list of samples
            num_workers=num_workers,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # or torch would draw the workers' seeds from the global one
            **options,
        )

    def render(self, batches: Iterable[list[ViewKey]]) -> Iterator[Tensor]:
        """Yield one uint8 [B, C, H, W] per batch of keys; raise DataError where an image cannot be read."""
        self._sampler.batches = batches
        for rendered in self._loader:
            if isinstance(rendered, DataError):
                raise rendered
            yield rendered
