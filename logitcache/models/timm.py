"""Models of timm, by name: an optional dependency."""

import re
from types import ModuleType
from typing import Any, Literal, Self

from pydantic import Field, JsonValue
from torch import nn

from logitcache.classifier import Preprocessing
from logitcache.config.recipe import Component
from logitcache.errors import LogitCacheError, RecipeError, needs_extra
from logitcache.models.base import BuiltModel, PretrainedFacts, risky_options
from logitcache.models.torchvision import another_count, imagenet_classes, require_known

# timm looks these up itself, outside its list of names.
_OUTSIDE = ("hf-hub:", "hf_hub:", "local-dir:")
_LISTED = re.compile(r"[A-Za-z0-9_.]+")  # neither a source nor a path
# What a manifest may set: rates and switches. Others load files (checkpoint_path), name URLs (pretrained_cfg) or sizes.
_PLAIN_OPTIONS = frozenset(
    {
        "drop_rate",
        "drop_path_rate",
        "drop_block_rate",
        "attn_drop_rate",
        "proj_drop_rate",
        "patch_drop_rate",
        "qkv_bias",
    }
)


class Timm(Component):
    """A classifier of timm; needs `pip install 'logitcache[timm]'`."""

    kind: Literal["timm"] = "timm"
    name: str = Field(
        description="Name of the model, with or without the tag of its weights.", examples=["resnet50.a1_in1k"]
    )
    pretrained: bool = Field(
        default=True, description="Whether to load timm's pretrained weights; `false` starts from random weights."
    )
    new_head: bool = Field(
        default=False,
        description="Whether pretrained weights get a new random final layer for another number of classes.",
    )
    options: dict[str, JsonValue] = Field(default={}, description="Further arguments of timm.create_model.")

    def build(self, num_classes: int | None, in_channels: int) -> BuiltModel:
        """Build the network; one with weights brings its own normalisation and size."""
        timm = self._library()
        if self.pretrained and not self.new_head:  # timm would put in a random layer unasked
            config = timm.get_pretrained_cfg(self.name)
            if num_classes is not None and config is not None and config.num_classes != num_classes:
                raise another_count(f"timm's {self.name}", config.num_classes, num_classes)
        module = self._network(timm, num_classes, in_channels)
        own: Any = getattr(module, "pretrained_cfg", {}).get("num_classes")  # known by now of a hub's or a folder's too
        if self.pretrained and not self.new_head and num_classes not in (None, own):
            raise another_count(f"timm's {self.name}", own, num_classes or 0)
        return BuiltModel(module, self._preprocessing(timm, module, in_channels))

    def pretrained_facts(self) -> PretrainedFacts:
        """Return what timm records of the weights; downloads nothing. Raises RecipeError for a model without any."""
        timm = self._library()
        config = timm.get_pretrained_cfg(self.name)
        if not timm.is_model_pretrained(self.name) or config.num_classes < 2:
            raise RecipeError(
                f"timm's {self.name} has no pretrained classifier.\n"
                f"  Fix: one that has: timm.list_pretrained('{self.name.partition('_')[0]}*')"
            )
        height, width = config.input_size[1:]
        size = height if height == width else (height, width)
        preprocessing = Preprocessing(mean=tuple(config.mean), std=tuple(config.std), input_size=size)
        return PretrainedFacts(config.num_classes, preprocessing, round(min(height, width) / config.crop_pct))

    def class_names(self) -> tuple[str, ...] | None:
        """Return the names of ImageNet's classes for listed weights of as many classes, as torchvision writes them.

        None for others. timm's own names are whole lists of synonyms, and not unique.
        """
        if not self.pretrained or not _LISTED.fullmatch(self.name):
            return None
        names = imagenet_classes()
        config = self._library().get_pretrained_cfg(self.name)
        return names if config is not None and config.num_classes == len(names) else None

    def risks(self) -> tuple[str, ...]:
        """Name a model outside timm's own list, and options that are no known rates or switches."""
        outside = () if _LISTED.fullmatch(self.name) else (f"the model '{self.name}'",)
        return outside + risky_options(self.options, _PLAIN_OPTIONS)

    def architecture(self) -> Self:
        """Return the same network with random weights."""
        return self.model_copy(update={"pretrained": False, "new_head": False})

    def _library(self) -> ModuleType:
        """Import timm. Raises MissingExtraError without it, RecipeError for a name that it does not have."""
        with needs_extra("a model of kind timm", "timm"):
            import timm
            import timm.data
        if not self.name.startswith(_OUTSIDE):
            require_known(self.name, {*timm.list_models(), *timm.list_pretrained()}, "timm", "model")
        module: ModuleType = timm
        return module

    def _network(self, timm: ModuleType, num_classes: int | None, in_channels: int) -> nn.Module:
        counts = {} if num_classes is None else {"num_classes": num_classes}
        try:
            module: nn.Module = timm.create_model(
                self.name,
                pretrained=self.pretrained,
                in_chans=in_channels,
                **counts,
                **self.options,
            )
        except OSError as error:
            raise LogitCacheError(
                f"the weights of timm's {self.name} could not be had: {error}.\n"
                "  Fix: run once on a machine with a network and bring its HF_HOME along, or use"
                " `checkpoint` with a file you have."
            ) from error
        except (TypeError, ValueError, RuntimeError, AssertionError) as error:
            raise RecipeError(
                f"timm's {self.name} cannot be built: {error}.\n"
                "  Fix: correct its `options`; pretrained: false starts from random weights."
            ) from error
        return module

    def _preprocessing(self, timm: ModuleType, module: nn.Module, in_channels: int) -> Preprocessing | None:
        """Return the weights' normalisation; None for images with other channels, which it does not fit."""
        config: dict[str, Any] = timm.data.resolve_model_data_config(module)
        if not self.pretrained or len(config["mean"]) != in_channels:
            return None
        height, width = config["input_size"][1:]
        return Preprocessing(mean=tuple(config["mean"]), std=tuple(config["std"]), input_size=(height, width))
