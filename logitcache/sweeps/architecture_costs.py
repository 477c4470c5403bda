"""What the models of a sweep cost, measured once for each architecture and recorded in the sweep's folder."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import JsonValue, TypeAdapter, ValidationError
from torch import Tensor

from logitcache.errors import CacheError
from logitcache.runtime.console import logger
from logitcache.runtime.device import own_randomness, resolve_device
from logitcache.store.files import write_atomically
from logitcache.store.safe_files import read_bounded
from logitcache.student.build_model import black, build_classifier
from logitcache.student.evaluation.cost import Contender, count_flops, count_parameters, median_seconds
from logitcache.student.speed import lay_out, without_auto
from logitcache.student.training_data import CachedData
from logitcache.student.training_recipes import StudentRecipe
from logitcache.sweeps.cells import SweepStudent
from logitcache.sweeps.sweep_recipe import Timing

_TOGETHER = 16
"""Models that are timed in turns, and in memory meanwhile."""
_DECIDING = {"model", "preprocessing", "precision", "channels_last", "device", "cache", "pairing"}
"""The entries of a recipe that decide what its model costs; cache and pairing decide the size of its images."""
_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class ArchitectureCost:
    """Parameters, floating-point operations for an image, and the median seconds of a batch as `measured` states."""

    parameters: int
    flops: int
    latency: float
    measured: dict[str, JsonValue]


_COST = TypeAdapter(ArchitectureCost)


class _Built(NamedTuple):
    contender: Contender
    image: Tensor


class ArchitectureCosts:
    """The costs of models by architecture: a resumed sweep compares by the same numbers."""

    def __init__(self, folder: Path, timing: Timing) -> None:
        """Keep records in a folder."""
        self._folder, self._timing = folder, timing

    def of(self, recipe: StudentRecipe) -> ArchitectureCost:
        """Read what the model of a recipe costs. Raises CacheError for a damaged record."""
        path = self._path(recipe)
        try:
            return _COST.validate_json(read_bounded(path, _MAX_BYTES))
        except (OSError, ValueError, ValidationError) as error:
            reason = str(error).partition("\n")[0]
            raise CacheError(
                f"{path} is damaged: {reason}. Fix: remove it; the model is then measured again"
            ) from error

    def measured(
        self, members: Sequence[SweepStudent], failed: Callable[[StudentRecipe, Exception], object]
    ) -> list[SweepStudent]:
        """Measure the models that are not recorded; return the students without those whose model fails."""
        built: dict[Path, _Built] = {}
        broken: set[str] = set()
        for member in members:
            path = self._path(member.recipe)
            if path in built or path.exists():
                continue
            try:
                built[path] = _build(member.recipe)
            except Exception as error:  # models of the user's own may raise anything
                failed(member.recipe, error)
                broken.add(member.run)
            if len(built) == _TOGETHER:
                self._record(built)
        self._record(built)
        return [member for member in members if member.run not in broken]

    def _path(self, recipe: StudentRecipe) -> Path:
        deciding = [recipe.model_dump(mode="json", include=_DECIDING), self._timing.model_dump()]
        digest = hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()
        return self._folder / f"{digest[:16]}.json"

    def _record(self, built: dict[Path, _Built]) -> None:
        """Time models in turns, record them, and forget them."""
        if not built:
            return
        timing = self._timing
        logger.info(f"{len(built)} models are timed, {timing.batch_size} images at a time")
        timed = [(one.contender, one.image.repeat(timing.batch_size, 1, 1, 1)) for one in built.values()]
        seconds = median_seconds(timed, timing.threads, timing.warm_up, timing.repeats)
        self._folder.mkdir(parents=True, exist_ok=True)
        for (path, (contender, image)), latency in zip(built.items(), seconds, strict=True):
            model = contender.model
            stated: dict[str, Any] = {"device": str(image.device), "precision": contender.precision}
            stated |= timing.model_dump()
            cost = ArchitectureCost(count_parameters(model), count_flops(model, image), latency, stated)
            write_atomically(path, json.dumps(asdict(cost), indent=2).encode())
        built.clear()


def _build(recipe: StudentRecipe) -> _Built:
    """Build the model of a recipe as training does; with a black image of the training size, on its device."""
    device = resolve_device(recipe.device)
    lesson = CachedData.open(recipe, recipe.dataset, None, {}).lesson(recipe)
    with own_randomness(device, recipe.seed):
        classifier = build_classifier(recipe, lesson, None)
    model, image = classifier.to(device), black(lesson)[0].to(device)
    lay_out(model, without_auto(recipe, model, image[None], device))
    count_flops(model, image)  # raises what the model raises on this device
    return _Built(Contender(model, recipe.precision), image)
