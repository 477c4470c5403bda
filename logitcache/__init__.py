"""Run a teacher once, keep its answers in a Zarr cache, train students on the pixels it saw."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_MODULES = {
    "cache.cache": ("Cache", "open_cache"),
    "cache.pairs.pair": ("pair",),
    "classifier": ("Classifier", "Preprocessing"),
    "config.recipe": ("load_recipe",),
    "errors": (
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
    "planning.plan": ("plan",),
    "report": ("figures",),
    "shipping.export": ("export",),
    "shipping.predict": ("predict",),
    "shipping.prune": ("prune",),
    "shipping.quantization.quantize": ("quantize",),
    "stage_one.derive.derive": ("DeriveRecipe", "derive"),
    "stage_one.precompute": ("PrecomputeRecipe", "precompute"),
    "stage_one.synthesize.synthesize": ("synthesize",),
    "stage_one.synthesize.synthesize_recipe": ("SynthesizeRecipe",),
    "student": ("losses",),
    "student.evaluation.evaluate": ("evaluate",),
    "student.runs.trained": ("load_student",),
    "student.training": ("train",),
    "student.training_recipes": ("StudentRecipe", "TeacherRecipe"),
    "sweeps.sweep": ("sweep",),
    "sweeps.sweep_recipe": ("SweepRecipe",),
    "targets": ("Batch", "Targets"),
    "views.keys": ("ViewKey",),
    "views.spec": ("ViewSpec",),
}
"""The public names by the module that defines them; type checkers read the same from the block below."""

_HOMES = {name: f"logitcache.{module}" for module, names in _MODULES.items() for name in names}
__all__ = sorted([*_HOMES, "__version__"])

if TYPE_CHECKING:
    # Aliases mark re-exports; one statement a module.
    # isort: off
    from logitcache.cache.cache import Cache as Cache, open_cache as open_cache
    from logitcache.cache.pairs.pair import pair as pair
    from logitcache.classifier import Classifier as Classifier, Preprocessing as Preprocessing
    from logitcache.config.recipe import load_recipe as load_recipe
    from logitcache.errors import (
        CacheError as CacheError,
        DataError as DataError,
        LogitCacheError as LogitCacheError,
        MismatchError as MismatchError,
        MissingExtraError as MissingExtraError,
        RecipeError as RecipeError,
        RemoteError as RemoteError,
        ReplayMismatchError as ReplayMismatchError,
        Stopped as Stopped,
    )
    from logitcache.planning.plan import plan as plan
    from logitcache.report import figures as figures
    from logitcache.shipping.export import export as export
    from logitcache.shipping.predict import predict as predict
    from logitcache.shipping.prune import prune as prune
    from logitcache.shipping.quantization.quantize import quantize as quantize
    from logitcache.stage_one.derive.derive import DeriveRecipe as DeriveRecipe, derive as derive
    from logitcache.stage_one.precompute import PrecomputeRecipe as PrecomputeRecipe, precompute as precompute
    from logitcache.stage_one.synthesize.synthesize import synthesize as synthesize
    from logitcache.stage_one.synthesize.synthesize_recipe import SynthesizeRecipe as SynthesizeRecipe
    from logitcache.student import losses as losses
    from logitcache.student.evaluation.evaluate import evaluate as evaluate
    from logitcache.student.runs.trained import load_student as load_student
    from logitcache.student.training import train as train
    from logitcache.student.training_recipes import StudentRecipe as StudentRecipe, TeacherRecipe as TeacherRecipe
    from logitcache.sweeps.sweep import sweep as sweep
    from logitcache.sweeps.sweep_recipe import SweepRecipe as SweepRecipe
    from logitcache.targets import Batch as Batch, Targets as Targets
    from logitcache.views.keys import ViewKey as ViewKey
    from logitcache.views.spec import ViewSpec as ViewSpec


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used; `import logitcache` loads no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'logitcache' has no attribute {name!r}")
    value = getattr(__import__(_HOMES[name], fromlist=[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
