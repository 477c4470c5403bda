"""Whether a cache is to blame for a loss that is not finite."""

import itertools
from collections.abc import Iterator

from torch import Tensor

from logitcache.errors import CacheError
from logitcache.targets import Targets
from logitcache.views.epochs import EpochLoader

_SHOWN = 3


def require_finite_targets(loader: EpochLoader, epoch: int, num_batches: int, cache: str) -> None:
    """Read the targets of an epoch's first batches again; raise CacheError for the first that are NaN or infinite."""
    for keys, teachers in itertools.islice(loader.targets(epoch), num_batches):
        for teacher, targets in teachers.items():
            for name, bad in _bad_rows(targets):
                if rows := bad.nonzero().flatten().tolist():
                    named = [
                        f"image {loader.views.dataset.ids[keys[row].index]!r} (view {keys[row].view})" for row in rows
                    ]
                    more = f" and {len(rows) - _SHOWN} more of the batch" if len(rows) > _SHOWN else ""
                    raise CacheError(
                        f"{cache}: {name} of teacher {teacher!r} hold NaN or infinity for "
                        f"{', '.join(named[:_SHOWN])}{more}: the loss is not finite whatever the learning rate.\n"
                        f"  Fix: `logitcache verify {cache}`, with --repair RECIPE for what is damaged; if it finds "
                        "nothing, these are the teacher's answers: make the cache again with `precision: float32`"
                    )


def _bad_rows(targets: Targets) -> Iterator[tuple[str, Tensor]]:
    """Yield the name of each target, and which rows hold a number that no teacher means, bool [B]."""
    if targets.num_classes:
        logits = targets.logits
        # A form that keeps a distribution may give a class no probability: log p is then -inf.
        wrong = ~logits.isfinite() if targets.keeps_logits else logits.isnan() | logits.isposinf()
        yield "logits", wrong.any(dim=1)
    for name, values in targets.features.items():
        yield f"features {name!r}", ~values.isfinite().flatten(1).all(dim=1)
