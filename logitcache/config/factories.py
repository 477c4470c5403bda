"""Import the user's own objects, named in the user's own recipe as "pkg.mod:name".

No name of a manifest is ever imported: opening a cache runs no code.
"""

import importlib
import os
import sys
from collections.abc import Mapping

from logitcache.errors import LogitCacheError, RecipeError, did_you_mean


def import_object(name: str) -> object:
    """Import the object "pkg.mod:name"; modules in the working directory are found.

    Raises RecipeError for a malformed name, a module that fails to import or a missing attribute.
    """
    module_name, colon, attribute = name.partition(":")
    if not (colon and module_name and attribute):
        raise RecipeError(f"'{name}' names no object. Write it as 'package.module:function'.")
    found: object = _import_module(module_name, name)
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError as cause:
            hint = did_you_mean(part, dir(found))
            raise RecipeError(f"'{name}': '{module_name}' has no '{part}'.{hint}") from cause
    return found


def call_factory(name: str, arguments: Mapping[str, object]) -> object:
    """Call the function "pkg.mod:name" with the arguments.

    Raises RecipeError, with the function's own error as its cause.
    """
    factory = import_object(name)
    if not callable(factory):
        raise RecipeError(
            f"'{name}' is of type {type(factory).__name__} and cannot be called. "
            "Name a function or a class that returns the object."
        )
    try:
        made: object = factory(**arguments)
    except LogitCacheError:
        raise
    except Exception as cause:  # the user's code may raise anything; it stays as the cause
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise RecipeError(f"'{name}' failed when called with ({given}): {type(cause).__name__}: {cause}") from cause
    return made


def _import_module(module_name: str, name: str) -> object:
    directory = os.getcwd()
    if directory not in sys.path:
        sys.path.insert(0, directory)  # it stays: workers that are spawned inherit the path
    importlib.invalidate_caches()
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as cause:
        if cause.name is None or not f"{module_name}.".startswith(f"{cause.name}."):
            raise RecipeError(f"'{name}': the module needs '{cause.name}': {cause}") from cause
        raise RecipeError(
            f"'{name}': there is no module '{cause.name}', neither installed nor in "
            f"'{directory}'. Run from the folder that holds it, or install it."
        ) from cause
    except Exception as cause:  # importing runs the user's code
        raise RecipeError(f"'{name}': importing '{module_name}' failed: {type(cause).__name__}: {cause}") from cause
