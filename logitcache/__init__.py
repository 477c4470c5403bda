"""Run a teacher once, keep its answers in a Zarr cache, train students on the pixels it saw."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from logitcache.cache.cache import Cache, open_cache
    from logitcache.config.recipe import load_recipe
    from logitcache.errors import (
        CacheError,
        DataError,
        LogitCacheError,
        MismatchError,
        MissingExtraError,
        RecipeError,
        RemoteError,
        ReplayMismatchError,
        Stopped,
    )
    from logitcache.models.base import Classifier, Preprocessing
    from logitcache.planning.report import plan
    from logitcache.stage_one.derive.derive import DeriveRecipe, derive
    from logitcache.stage_one.precompute import PrecomputeRecipe, precompute
    from logitcache.student import losses
    from logitcache.student.evaluation.evaluate import evaluate
    from logitcache.student.runs.trained import load_student
    from logitcache.student.training import train
    from logitcache.student.training_recipes import StudentRecipe, TeacherRecipe
    from logitcache.targets import Batch, Targets
    from logitcache.views.keys import ViewKey
    from logitcache.views.spec import ViewSpec

__all__ = [
    "Batch",
    "Cache",
    "CacheError",
    "Classifier",
    "DataError",
    "DeriveRecipe",
    "LogitCacheError",
    "MismatchError",
    "MissingExtraError",
    "PrecomputeRecipe",
    "Preprocessing",
    "RecipeError",
    "RemoteError",
    "ReplayMismatchError",
    "Stopped",
    "StudentRecipe",
    "Targets",
    "TeacherRecipe",
    "ViewKey",
    "ViewSpec",
    "__version__",
    "derive",
    "evaluate",
    "load_recipe",
    "load_student",
    "losses",
    "open_cache",
    "plan",
    "precompute",
    "train",
]

_MODULES = {
    "logitcache.cache.cache": ("Cache", "open_cache"),
    "logitcache.errors": (
        "CacheError",
        "DataError",
        "LogitCacheError",
        "MismatchError",
        "MissingExtraError",
        "RecipeError",
        "RemoteError",
        "ReplayMismatchError",
        "Stopped",
    ),
    "logitcache.models.base": ("Classifier", "Preprocessing"),
    "logitcache.config.recipe": ("load_recipe",),
    "logitcache.planning.report": ("plan",),
    "logitcache.student.evaluation.evaluate": ("evaluate",),
    "logitcache.student.training_recipes": ("StudentRecipe", "TeacherRecipe"),
    "logitcache.student.runs.trained": ("load_student",),
    "logitcache.student.training": ("train",),
    "logitcache.targets": ("Batch", "Targets"),
    "logitcache.stage_one.derive.derive": ("DeriveRecipe", "derive"),
    "logitcache.stage_one.precompute": ("PrecomputeRecipe", "precompute"),
    "logitcache.views.keys": ("ViewKey",),
    "logitcache.views.spec": ("ViewSpec",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used; `import logitcache` loads no torch."""
    if name == "losses":
        value: Any = import_module("logitcache.student.losses")
    elif name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module 'logitcache' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
