"""Open what images are synthesized from: a teacher with BatchNorm and, in an adaptive round, a student."""

from pathlib import Path

import torch
from torch import nn

from logitcache.classifier import Classifier
from logitcache.errors import RecipeError
from logitcache.models import BuiltModel, Preprocessing, load_model, resolve_preprocessing
from logitcache.runtime.device import own_randomness, resolve_device
from logitcache.stage_one.synthesize.batches import Synthesizer
from logitcache.stage_one.synthesize.losses import has_statistics
from logitcache.stage_one.synthesize.synthesize_recipe import SynthesisTeacher, SynthesizeRecipe
from logitcache.views.augmentations.base import pair


def open_networks(
    recipe: SynthesizeRecipe, teacher: nn.Module | None, student: str | Path | nn.Module | None
) -> Synthesizer:
    """Build the networks, and compare them with each other and the images; nothing is written.

    Raises RecipeError for a teacher without BatchNorm, for images without a size, for classes that would get no image.
    """
    device = resolve_device(recipe.device)
    classifier = _teacher(recipe, teacher, device)
    if not any(map(has_statistics, classifier.module.modules())):
        raise RecipeError(
            "the teacher has no BatchNorm with running statistics, and images are synthesized from these. Fix: a "
            "teacher of convolutions and BatchNorm, such as a ResNet; for others images of any kind (precompute)"
        )
    shape = (recipe.channels, *_size(recipe, classifier.preprocessing))
    num_classes = _num_classes(classifier, shape)
    learner = None if student is None else _student(student, device)
    if learner is not None and (count := _num_classes(learner, shape)) != num_classes:
        raise RecipeError(f"the student has {count} classes, the teacher {num_classes}. Fix: a student of this teacher")
    return Synthesizer(recipe, classifier, learner, num_classes, shape)


def require_teacher(recipe: SynthesizeRecipe) -> SynthesisTeacher:
    """Return the entry of the teacher. Raises RecipeError without one."""
    if recipe.teacher is None:
        raise RecipeError("the recipe names no teacher. Fix: teacher: {model: …}, or pass the module itself")
    return recipe.teacher


def _teacher(recipe: SynthesizeRecipe, module: nn.Module | None, device: torch.device) -> Classifier:
    """Build the recipe's teacher, or wrap a module; one that is no Classifier does not know its normalisation."""
    if module is not None:
        return _classifier(module, "teacher", device)
    source = require_teacher(recipe)
    with own_randomness(device, 0):
        built = source.model.build(None, recipe.channels)
    chosen = resolve_preprocessing(built, source.preprocessing, who="teacher")
    return Classifier(built.module, chosen, source.classes, "the teacher").to(device).eval()


def _student(student: str | Path | nn.Module, device: torch.device) -> Classifier:
    """Load a run, or wrap a module."""
    if isinstance(student, nn.Module):
        return _classifier(student, "student", device)
    built = load_model(Path(student).expanduser())
    return (
        Classifier(built.module, resolve_preprocessing(built, None, who="student"), None, "the student")
        .to(device)
        .eval()
    )


def _classifier(module: nn.Module, who: str, device: torch.device) -> Classifier:
    if not isinstance(module, Classifier):
        module = Classifier(module, resolve_preprocessing(BuiltModel(module, None), None, who=who))
    return module.to(device).eval()


def _size(recipe: SynthesizeRecipe, preprocessing: Preprocessing) -> tuple[int, int]:
    """Return the height and width of the images."""
    size = preprocessing.size if recipe.size is None else pair(recipe.size)
    if size is None:
        raise RecipeError(
            "the teacher takes images of any size, and the recipe gives none. Fix: size: that of training"
        )
    return size


@torch.no_grad()
def _num_classes(classifier: Classifier, shape: tuple[int, int, int]) -> int:
    """Return how many logits a classifier gives images [C, H, W]."""
    device = classifier.mean.device
    return int(classifier(torch.zeros(2, *shape, dtype=torch.uint8, device=device)).shape[1])
