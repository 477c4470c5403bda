"""Models, for teachers and students alike: recipe entries from which a network is built."""

from typing import Annotated

from pydantic import Field
from torch import nn

from logitcache.classifier import Classifier, Preprocessing
from logitcache.models.base import BuiltModel, default_preprocessing, resolve_preprocessing
from logitcache.models.checkpoint import Checkpoint
from logitcache.models.custom import Custom
from logitcache.models.hugging_face.transformers import Transformers
from logitcache.models.imported.answers import AnswersByKey, ImportedAnswers
from logitcache.models.pruning.pruned import Pruned
from logitcache.models.quantization.quantized import Quantized
from logitcache.models.quantization.quantized_run import QuantizedRun
from logitcache.models.small_cnn import SmallCNN
from logitcache.models.stored import (
    Architecture,
    Bundled,
    Run,
    StoredModel,
    bundled_directory,
    load_into,
    load_model,
    read_stored,
    save_model,
)
from logitcache.models.timm import Timm
from logitcache.models.torchvision import Torchvision
from logitcache.models.weights import load_weights, read_state, save_weights, weights_digest

__all__ = [
    "AnswersByKey",
    "Architecture",
    "BuiltModel",
    "Bundled",
    "Checkpoint",
    "Classifier",
    "Custom",
    "ImportedAnswers",
    "Model",
    "Preprocessing",
    "Pruned",
    "Quantized",
    "QuantizedRun",
    "Run",
    "SmallCNN",
    "StoredModel",
    "Timm",
    "Torchvision",
    "Transformers",
    "architecture_of",
    "bundled_directory",
    "default_preprocessing",
    "load_into",
    "load_model",
    "load_weights",
    "plain",
    "read_state",
    "read_stored",
    "resolve_preprocessing",
    "save_model",
    "save_weights",
    "weights_digest",
]

Model = Annotated[
    Bundled
    | SmallCNN
    | Torchvision
    | Timm
    | Transformers
    | ImportedAnswers
    | Checkpoint
    | Run
    | Pruned
    | QuantizedRun
    | Custom,
    Field(discriminator="kind"),
]


def architecture_of(model: Model, module: nn.Module) -> Architecture:
    """Return the architecture from which the weights of a module are loaded again, which was built from an entry."""
    return model.architecture_of(module) if isinstance(model, Pruned) else model.architecture()


def plain(model: Model, module: nn.Module) -> nn.Module:
    """Return a trained module as the architecture of its entry has it."""
    return model.plain(module) if isinstance(model, Pruned) else module
