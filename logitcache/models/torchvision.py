"""Models of torchvision, by name."""

from collections.abc import Collection
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Literal, Self

import torch
from pydantic import Field, JsonValue
from torch import nn

from logitcache.classifier import Preprocessing, channels_fix
from logitcache.config.recipe import Component
from logitcache.errors import LogitCacheError, RecipeError
from logitcache.models.base import BuiltModel, PretrainedFacts, risky_options
from logitcache.models.weights import nearest_names

if TYPE_CHECKING:
    from torchvision.models import WeightsEnum

# What torchvision sets unasked when it gives these their weights; the network is another without.
_SET_BY_WEIGHTS: dict[str, dict[str, JsonValue]] = {
    "googlenet": {"transform_input": True, "aux_logits": False, "init_weights": False},
    "inception_v3": {"transform_input": True, "init_weights": False},
}

# What a manifest may set: switches, and rates.
_PLAIN_OPTIONS = frozenset(
    {"transform_input", "aux_logits", "init_weights", "dropout", "stochastic_depth_prob", "progress"}
)


class Torchvision(Component):
    """A classifier of torchvision."""

    kind: Literal["torchvision"] = "torchvision"
    name: str = Field(description="Name of the model.", examples=["resnet50"])
    weights: str | None = Field(
        description="Name of the weights, such as `DEFAULT`, which bring their preprocessing; null starts from random "
        "weights.",
        examples=["IMAGENET1K_V2", None],
    )
    new_head: bool = Field(
        default=False,
        description="Whether pretrained weights get a new random final layer for another number of classes.",
    )
    options: dict[str, JsonValue] = Field(default={}, description="Further arguments of the model's constructor.")

    def build(self, num_classes: int | None, in_channels: int) -> BuiltModel:
        """Build the network, with the weights' own normalisation and size when it has weights."""
        _require_classifier(self.name)
        if in_channels != 3:
            raise RecipeError(
                f"torchvision's {self.name} takes 3 channels, the images have {in_channels}.\n  Fix: {channels_fix(3)}"
            )
        if self.weights is None:
            return BuiltModel(self._network(None, num_classes), None)
        return self._pretrained(_find_weights(self.name, self.weights), num_classes)

    def pretrained_facts(self) -> PretrainedFacts:
        """Return what torchvision records of the weights; downloads nothing. Raises RecipeError for unknown ones."""
        _require_classifier(self.name)
        weights = _find_weights(self.name, self.weights or "DEFAULT")
        transforms = weights.transforms()
        preprocessing = Preprocessing(
            mean=tuple(transforms.mean), std=tuple(transforms.std), input_size=transforms.crop_size[0]
        )
        return PretrainedFacts(len(weights.meta["categories"]), preprocessing, transforms.resize_size[0])

    def class_names(self) -> tuple[str, ...] | None:
        """Return the names of the weights' classes; None if these are random. Raises RecipeError for unknown ones."""
        if self.weights is None:
            return None
        _require_classifier(self.name)
        return tuple(_find_weights(self.name, self.weights).meta["categories"])

    def risks(self) -> tuple[str, ...]:
        """Name options that are no known rates or switches."""
        return risky_options(self.options, _PLAIN_OPTIONS)

    def architecture(self) -> Self:
        """Return the same network with random weights."""
        unasked = {} if self.weights is None else _SET_BY_WEIGHTS.get(self.name, {})
        options = {**unasked, **self.options}
        return self.model_copy(update={"weights": None, "new_head": False, "options": options})

    def _network(self, weights: "WeightsEnum | None", num_classes: int | None) -> nn.Module:
        counts = {} if num_classes is None else {"num_classes": num_classes}
        try:
            module: nn.Module = _library().get_model_builder(self.name)(weights=weights, **counts, **self.options)
        except OSError as error:
            assert weights is not None
            raise LogitCacheError(
                f"the weights {weights.name} of torchvision's {self.name} could not be had:"
                f" {error}.\n"
                f"  Fix: on a machine with a network, download {weights.url}\n"
                f"    and put the file into {torch.hub.get_dir()}/checkpoints. train-teacher and train-student may"
                " begin with random weights instead (--set model.weights=null); the teacher of a cache may not"
            ) from error
        except (TypeError, ValueError, RuntimeError) as error:
            raise RecipeError(
                f"torchvision's {self.name} cannot be built: {error}.\n  Fix: correct its `options`."
            ) from error
        return module

    def _pretrained(self, weights: "WeightsEnum", num_classes: int | None) -> BuiltModel:
        own_classes, preprocessing, _ = self.pretrained_facts()
        wanted = own_classes if num_classes is None else num_classes
        if wanted != own_classes and not self.new_head:
            raise another_count(f"torchvision's {self.name}", own_classes, wanted)
        module = self._network(weights, None)
        if wanted != own_classes:
            # The layers whose shapes the number of classes decides come from a fresh network.
            fresh = self._network(None, wanted)
            new = fresh.state_dict()
            changed = [n for n, v in module.state_dict().items() if new[n].shape != v.shape]
            for layer in {name.rpartition(".")[0] for name in changed}:
                module.set_submodule(layer, fresh.get_submodule(layer))
        return BuiltModel(module, preprocessing)


def imagenet_classes() -> tuple[str, ...]:
    """Return the names of ImageNet's 1,000 classes in the order of their WordNet numbers, as torchvision has them."""
    return Torchvision(name="resnet50", weights="DEFAULT").class_names() or ()


def require_known(name: str, known: Collection[str], library: str, what: str) -> None:
    """Raise RecipeError for a name that a library does not have, with the nearest ones."""
    if name not in known:
        raise RecipeError(f"{library} has no {what} '{name}'.\n  Fix: {nearest_names(name, known)}")


def another_count(who: str, own_classes: int, wanted: int) -> RecipeError:
    """Describe a pretrained classifier that is asked for another number of classes."""
    return RecipeError(
        f"{who} is pretrained for {own_classes} classes, {wanted} are asked for.\n"
        f"  Fix: a `checkpoint` trained on these {wanted} classes; or, to fine-tune,"
        " `new_head: true` or random weights."
    )


def _library() -> ModuleType:
    return import_module("torchvision.models")  # imports torch's compiler, for seconds


def _require_classifier(name: str) -> None:
    zoo = _library()
    require_known(name, zoo.list_models(module=zoo), "torchvision", "classifier")


def _find_weights(name: str, weights: str) -> "WeightsEnum":
    enum = _library().get_model_weights(name)
    if weights not in enum.__members__:
        raise RecipeError(
            f"torchvision's {name} has no weights '{weights}'.\n"
            f"  Fix: use one of {', '.join(enum.__members__)}, or null for random weights."
        )
    return enum[weights]
