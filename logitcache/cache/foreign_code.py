"""Views that other code has a part in: the user's functions, and transforms that are locked to a release."""

import json
import warnings
from collections.abc import Sequence
from importlib.metadata import version

from logitcache.errors import RecipeError, ReplayMismatchError
from logitcache.views.augmentations.foreign import factories_of, foreign_transforms
from logitcache.views.canaries import Level
from logitcache.views.spec import ViewSpec


def require_trusted(spec: ViewSpec, factories: Sequence[str], where: str) -> None:
    """Raise RecipeError for a function of the views that the user has not named: a cache never names code to run."""
    named = dict.fromkeys(factories_of(spec.augmentations))
    trusted = set(factories)  # of a text, its letters
    unknown = [factory for factory in named if factory not in trusted]
    if unknown:
        listed = json.dumps(unknown)
        raise RecipeError(
            f"the views of {where} call functions of a user's own code: {listed}. Fix: if you know them, name them: "
            f"`factories: {listed}` in the student's recipe, --set 'factories={listed}', or cache.loader(factories=…)"
        )


def require_releases(spec: ViewSpec, verify: Level, where: str) -> None:
    """Raise ReplayMismatchError, or warn where `verify` is numeric, for transforms locked to another torchvision.

    Canaries cannot prove these: what a transform draws is its own affair, and 32 views may not meet every branch of it.
    """
    here = version("torchvision")
    lines = [
        f"{used.what}: torchvision {used.torchvision}, here {here}"
        for used in foreign_transforms(spec.augmentations)
        if used.torchvision != here
    ]
    if not lines or verify == "off":
        return
    message = "\n  ".join([f"the views of {where} are locked to another release", *lines])
    if verify == "strict":
        raise ReplayMismatchError(
            f"{message}\n  Fix: install that release, accept what the canaries do not show with --verify numeric, or "
            "precompute again"
        )
    warnings.warn(message, stacklevel=4)
