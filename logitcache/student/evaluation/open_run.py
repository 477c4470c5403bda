"""Open a finished run: its recipe, its model and its images; code and places that it names must be stated again."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from logitcache.config.recipe import is_stated, load_recipe, read_recipe
from logitcache.config.trust import require_grant
from logitcache.errors import RecipeError
from logitcache.models import Classifier, Custom, StoredModel, load_model, read_stored, resolve_preprocessing
from logitcache.runtime.device import own_randomness, resolve_device
from logitcache.store.remote.client import is_remote
from logitcache.store.safe_files import read_bounded
from logitcache.student.evaluation.alignment import require_features
from logitcache.student.evaluation.validation import Validator, open_validator
from logitcache.student.runs.run_directory import MAX_RECIPE_BYTES
from logitcache.student.runs.trained import Evaluation, read_evaluation
from logitcache.student.speed import lay_out
from logitcache.student.training_recipes import StudentRecipe, TeacherRecipe, TrainingRecipe
from logitcache.views.augmentations.foreign import factories_of
from logitcache.views.datasets import Dataset
from logitcache.views.datasets.custom import Custom as CustomImages

MODEL_FACTORY = "model.factory="
_SHARE_OF_MEMORY = 16  # a batch of images takes this part at most: features take more


class OpenedRun(NamedTuple):
    """A finished run to measure: its recipe, its model on a device, and the images."""

    recipe: StudentRecipe | TeacherRecipe
    classifier: Classifier
    validator: Validator
    device: torch.device


def open_run(run: Path, overrides: Sequence[str] = ()) -> OpenedRun:
    """Load a finished run and open its validation images, or others by `overrides`. Raises as `evaluate`."""
    recipe = read_run(run, overrides)
    classifier = load_run(run, recipe, overrides)
    num_classes = read_stored(run / "model.json").num_classes
    validator = open_recorded_validator(str(run), recipe, read_evaluation(run), num_classes)
    assert recipe.validation is not None, "or there would be no images"
    device, batch = resolve_device(recipe.device), min(recipe.validation.batch_size, validator.num_images)
    require_memory(run, classifier, batch, device.type, "--set validation.batch_size=")
    return OpenedRun(recipe, classifier, validator, device)


def load_run(run: Path, recipe: TrainingRecipe, overrides: Sequence[str] = ()) -> Classifier:
    """Load the network of a finished run onto the device of its recipe. Raises RecipeError."""
    device, stored = resolve_device(recipe.device), read_stored(run / "model.json")
    # A network draws its first weights, which are then replaced.
    with own_randomness(device, recipe.seed):
        built = load_model(run, stated_factory(run, stored, overrides), recipe.trust)
    classifier = Classifier(built.module, resolve_preprocessing(built, None, who=str(run))).to(device).eval()
    return lay_out(classifier, recipe)


def require_memory(run: Path, classifier: Classifier, batch: int, device: str, option: str) -> None:
    """Raise RecipeError if a batch at the size that `model.json` states would take much of this machine's memory."""
    size = classifier.preprocessing.size
    if size is None or device != "cpu":
        return
    of_image = 4 * len(classifier.preprocessing.mean) * size[0] * size[1]
    most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // (_SHARE_OF_MEMORY * of_image)
    if batch > most:
        raise RecipeError(
            f"{run / 'model.json'} resizes images to {size}: {batch} of them take {batch * of_image / 1e9:.1f} GB.\n"
            f"  Fix: {option}{max(1, most)}, or copy the run again if that size is not its own"
        )


def open_recorded_validator(
    who: str, recipe: TrainingRecipe, recorded: Evaluation | None, num_classes: int
) -> Validator:
    """Open the images to measure a model on, of which `who` is the name; raises RecipeError if the recipe names none.

    Images that the user names, without augmentations for them, are brought to the model as it was `recorded`.
    """
    validation = recipe.validation
    bare = validation is not None and validation.cache is None and validation.split is None
    if validation is not None and bare and "augmentations" not in validation.model_fields_set and recorded is not None:
        for factory in factories_of(recorded.augmentations):
            raise RecipeError(
                f"{who} was evaluated through the factory '{factory}', and what a file names is never called.\n"
                "  Fix: name the augmentations too: --set validation.augmentations=[…]"
            )
        changed = validation.model_copy(update={"augmentations": recorded.augmentations})
        recipe = recipe.model_copy(update={"validation": changed})
    validator = open_validator(recipe, num_classes)
    if validator is None:
        raise RecipeError(
            f"{who} names no images to measure on. Fix: --set validation.dataset=… or --set validation.cache=…"
        )
    if recipe.measured_taps:
        require_features(validator)
    if recorded is not None:
        validator.require_order(recorded.class_names)
    return validator


def read_run(run: Path, overrides: Sequence[str] = ()) -> StudentRecipe | TeacherRecipe:
    """Read a run's recipe, except its model, which `model.json` describes; `overrides` change it.

    No factory that a file names is left in it: what the user does not state again is refused or removed.
    """
    path = run / "recipe.yaml"
    recipe = unopened_recipe(run, overrides)
    _require_stated(recipe, path, overrides)
    images = recipe.validation
    places = {} if images is None else {"validation.dataset": images.dataset, "validation.cache": images.cache}
    instead = "--set validation.…: name other images"
    require_grant(_risks(places, overrides), _digest(path), recipe.trust, str(path), instead)
    return recipe


def unopened_recipe(run: Path, overrides: Sequence[str] = ()) -> StudentRecipe | TeacherRecipe:
    """Read a run's recipe for what it computes with: no place or function that the file names may be opened by it."""
    path = run / "recipe.yaml"
    _digest(path)  # names a folder that is no run
    others = [text for text in overrides if not text.startswith(MODEL_FACTORY)]
    kind: type[StudentRecipe | TeacherRecipe] = StudentRecipe if "cache" in read_recipe(path) else TeacherRecipe
    recipe = load_recipe(path, kind, others)
    # What a run's file allows, the user has not allowed.
    unsaid = [key for key in ("factories", "trust") if not is_stated(key, others)]
    return recipe.model_copy(update=dict.fromkeys(unsaid, ()))


def _digest(path: Path) -> str:
    """Return the sha256 of a run's recipe. Raises RecipeError."""
    try:
        return hashlib.sha256(read_bounded(path, MAX_RECIPE_BYTES)).hexdigest()
    except (FileNotFoundError, NotADirectoryError) as error:
        lacks = f"it has no {path.name}" if path.parent.exists() else "no such folder exists"
        raise RecipeError(
            f"{path.parent} is no run: {lacks}. Fix: name the `out:` directory of a finished training"
        ) from error
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path} cannot be read: {error}. Fix: copy the run again") from error


def _risks(places: Mapping[str, Dataset | str | None], overrides: Sequence[str]) -> tuple[str, ...]:
    """Name the data sets and caches beyond the allow-list, by key, that a run's file names, and not the user."""
    named = [place for key, place in places.items() if place is not None and not is_stated(key, overrides)]
    caches = [f"the cache '{place}'" for place in named if isinstance(place, str) and is_remote(place)]
    images = [place for place in named if not isinstance(place, str | CustomImages)]  # code is refused apart
    return (*(risk for place in images for risk in place.risks()), *caches)


def require_known_source(run: Path, recipe: StudentRecipe | TeacherRecipe, overrides: Sequence[str]) -> None:
    """Raise RefusedError if a run's file, and not the user, names a place beyond the allow-list to have learnt from."""
    places = {"cache": recipe.cache} if isinstance(recipe, StudentRecipe) else {"dataset": recipe.dataset}
    path = run / "recipe.yaml"
    require_grant(_risks(places, overrides), _digest(path), recipe.trust, str(path))


def require_known_images(run: Path, recipe: StudentRecipe, overrides: Sequence[str]) -> None:
    """Raise RecipeError or RefusedError if a run's file, and not the user, names code or a URL for its images."""
    named, path = recipe.dataset, run / "recipe.yaml"
    if isinstance(named, CustomImages) and not is_stated("dataset.factory", overrides):
        fix = f"Fix: if you trust it, --set dataset.factory={named.factory}"
        raise RecipeError(f"{run} learnt from images of code, and what a file names is never called. {fix}")
    require_grant(_risks({"dataset": named}, overrides), _digest(path), recipe.trust, str(path))


def _require_stated(recipe: TrainingRecipe, path: Path, overrides: Sequence[str]) -> None:
    """Raise RecipeError if a run's file, and not the user, names a factory to call."""
    if recipe.validation is None:
        return
    images = recipe.validation.dataset
    named = {"validation.dataset.factory": images.factory} if isinstance(images, CustomImages) else {}
    for number, augmentation in enumerate(recipe.validation.augmentations):
        named |= {f"validation.augmentations.{number}.factory": name for name in factories_of([augmentation])}
    for key, factory in named.items():
        if not is_stated(key, overrides):
            raise RecipeError(
                f"{path} names the factory '{factory}', and what a file names is never called.\n"
                f"  Fix: if you trust it, --set {key}={factory}"
            )


def stated_factory(run: Path, stored: StoredModel, overrides: Sequence[str]) -> str | None:
    stated = [text.removeprefix(MODEL_FACTORY) for text in overrides if text.startswith(MODEL_FACTORY)]
    if stored.model is None and not stated:
        raise RecipeError(
            f"{run} is of a module that was passed to train, and names no model.\n"
            f"  Fix: --set {MODEL_FACTORY}pkg.mod:function, which returns such a module"
        )
    if isinstance(stored.network, Custom) and not stated:
        raise RecipeError(
            f"{run} is a model of the factory '{stored.network.factory}', and what a file names is never called.\n"
            f"  Fix: if you trust it, --set {MODEL_FACTORY}{stored.network.factory}"
        )
    return stated[-1] if stated else None
