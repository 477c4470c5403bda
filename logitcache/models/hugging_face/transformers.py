"""Models of transformers: a folder that save_pretrained wrote, or one of the Hub."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, JsonValue, field_validator, model_validator
from torch import nn

from logitcache.classifier import channels_fix
from logitcache.config.recipe import Component
from logitcache.errors import RecipeError
from logitcache.models.base import BuiltModel, OwnArchitecture
from logitcache.models.bounded import TooLarge
from logitcache.models.hugging_face.folder import (
    folder_of,
    library,
    num_labels,
    plain_settings,
    require_safetensors,
    settings_of,
)
from logitcache.models.hugging_face.processor import preprocessing_of
from logitcache.models.hugging_face.zero_shot import zero_shot_classifier
from logitcache.models.torchvision import another_count
from logitcache.runtime.console import logger

Task = Literal["classification", "features", "zero_shot"]
_SHOWN = 3


class Transformers(Component):
    """A vision model of transformers; needs `pip install 'logitcache[hf]'`.

    Weights are read only from safetensors, no code in a repository is run, and missing weights are an error. Taps are
    the module paths of transformers.
    """

    kind: Literal["transformers"] = "transformers"
    path: str = Field(
        description="Folder written by `save_pretrained`, or `hf://OWNER/NAME` on the Hub.",
        examples=["models/vit", "hf://google/vit-base-patch16-224"],
    )
    revision: str | None = Field(
        default=None,
        description="Branch, tag or commit of a model on the Hub; by default its main branch.",
        examples=["main"],
    )
    task: Task = Field(
        default="classification",
        description="`classification` outputs logits for the classes that the weights were trained on; `features` is a "
        "network without a head, for `logits: null`; `zero_shot` compares images with `labels` (CLIP and SigLIP).",
    )
    labels: tuple[str, ...] = Field(
        default=(), description="Class names for `zero_shot`, in the order of the classes.", examples=[["cat", "dog"]]
    )
    templates: Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        default=("a photo of a {}.",),
        description="Prompt templates for `zero_shot`, with `{}` for the label; their embeddings are averaged.",
    )
    new_head: bool = Field(
        default=False,
        description="Whether pretrained weights get a new random final layer for another number of classes.",
    )

    @field_validator("templates")
    @classmethod
    def _have_a_place(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
        wrong = [template for template in templates if template.count("{}") != 1]
        if wrong:
            raise ValueError(f"{wrong[0]!r} has no place for a label: write {{}} once")
        return templates

    @model_validator(mode="after")
    def _labels_are_of_zero_shot(self) -> Self:
        if self.task != "zero_shot" and self.labels:
            raise ValueError(f"labels are of task: zero_shot, and the task is {self.task}: leave them out")
        if self.task == "zero_shot" and len(self.labels) < 2:
            raise ValueError(f"task: zero_shot takes labels, two or more names of classes, not {len(self.labels)}")
        twice = sorted({label for label in self.labels if self.labels.count(label) > 1})
        if twice:
            raise ValueError(f"the label {twice[0]!r} is there twice: each class has its own")
        return self

    def idle(self, epochs: float) -> str | None:
        """Return why templates have no effect."""
        if "templates" in self.model_fields_set and self.task != "zero_shot":
            return f"has templates, and its task is {self.task}. Fix: leave them out"
        return None

    def build(self, num_classes: int | None, in_channels: int) -> BuiltModel:
        """Build the network with its weights, and the normalisation and size of its processor."""
        if self.task != "classification" and num_classes is not None:
            raise RecipeError(
                f"a model of task: {self.task} is a teacher, and no network to train for {num_classes} classes.\n"
                "  Fix: task: classification, with new_head: true"
            )
        folder = folder_of(self.path, self.revision)
        settings = settings_of(folder)
        require_safetensors(folder)
        _require_channels(settings, in_channels, self.path)
        with quiet():
            module = self._network(folder, settings, num_classes)
            return BuiltModel(module, preprocessing_of(folder, in_channels))

    def class_names(self) -> tuple[str, ...] | None:
        """Return the labels of a zero-shot classifier; None for other tasks, whose labels lie in the folder."""
        return self.labels or None

    def risks(self) -> tuple[str, ...]:
        """Name the folder or the repository."""
        return (f"the model '{self.path}'",)

    def architecture(self) -> "TransformersNetwork":
        """Return the network with random weights."""
        return TransformersNetwork(config=settings_of(folder_of(self.path, self.revision)))

    def _network(self, folder: Path, settings: dict[str, JsonValue], num_classes: int | None) -> nn.Module:
        config = configured(settings, self.path)
        if self.task == "zero_shot":
            return zero_shot_classifier(
                lambda: _loaded(library().AutoModel, folder, config, self.path),
                config.model_type,
                folder,
                self.labels,
                self.templates,
            )
        if self.task == "features":
            return _loaded(library().AutoModel, folder, getattr(config, "vision_config", config), self.path)
        own = num_labels(folder)
        if num_classes not in (None, own) and not self.new_head:
            raise another_count(f"transformers' {self.path}", own, num_classes or 0)
        config.num_labels = num_classes or own
        new_head = self.new_head and config.num_labels != own
        return _loaded(library().AutoModelForImageClassification, folder, config, self.path, new_head)


class TransformersNetwork(OwnArchitecture):
    """The stored form of an image classifier of transformers: its `config.json`, without weights."""

    kind: Literal["transformers_network"] = "transformers_network"
    config: dict[str, JsonValue] = Field(
        description="Content of the model's `config.json`, without entries that name code or kernels.",
        examples=[{"model_type": "vit", "hidden_size": 192}],
    )

    def build(self, num_classes: int | None, in_channels: int) -> BuiltModel:
        """Build the network with random weights."""
        who = f"the network {str(self.config.get('model_type'))!r}"
        settings = plain_settings(self.config)
        _require_channels(settings, in_channels, who)
        config = configured(settings, who)
        if num_classes is not None:
            config.num_labels = num_classes
        with quiet(), _refused(who):
            module: nn.Module = library().AutoModelForImageClassification.from_config(config, trust_remote_code=False)
        return BuiltModel(module, None)

    def risks(self) -> tuple[str, ...]:
        """Name the network: its settings decide how large it is, and transformers reads them."""
        return (f"the network {str(self.config.get('model_type'))!r:.80} of transformers",)


def configured(settings: dict[str, JsonValue], who: str) -> Any:
    """Make the configuration of a network of its settings. Raises RecipeError."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = settings["model_type"]
    if kind not in CONFIG_MAPPING:
        version = library().__version__
        raise RecipeError(
            f"{who} is of type {kind!r}, which transformers {version} does not have, and code of a repository is not "
            "run.\n  Fix: another version of transformers, or `custom` with your own function"
        )
    with _refused(who):
        return CONFIG_MAPPING[kind].from_dict(dict(settings))


def _require_channels(settings: dict[str, JsonValue], in_channels: int, who: str) -> None:
    vision = settings.get("vision_config")
    count = (vision if isinstance(vision, dict) else settings).get("num_channels", 3)
    if count != in_channels:
        raise RecipeError(f"{who} takes {count} channels, the images have {in_channels}.\n  Fix: {channels_fix(3)}")


def _loaded(auto: Any, folder: Path, config: Any, who: str, new_head: bool = False) -> nn.Module:
    """Load a network in float32. Raises RecipeError if the weights lack any of its tensors."""
    with _refused(who):
        module, report = auto.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=new_head,
            output_loading_info=True,
        )
    lacking = sorted(map(str, report["missing_keys"]))
    if auto is library().AutoModel and lacking and all(name.startswith("pooler.") for name in lacking):
        module.pooler, lacking = None, []  # a classifier's weights have none, and features are taken before it
    if lacking and not new_head:
        some = ", ".join(lacking[:_SHOWN]) + (", …" if len(lacking) > _SHOWN else "")
        raise RecipeError(
            f"the weights of {who} lack {len(lacking)} tensors of the network: {some}.\n"
            "  Fix: `task:` for which they were trained, such as features; or new_head: true, to fine-tune"
        )
    if report["unexpected_keys"]:
        logger.info(f"{who}: {len(report['unexpected_keys'])} tensors of its weights are of no part of the network")
    loaded: nn.Module = module
    return loaded


@contextlib.contextmanager
def _refused(who: str) -> Iterator[None]:
    """Raise what transformers raises for wrong settings or weights as RecipeError."""
    try:
        yield
    except (RecipeError, TooLarge):
        raise
    except Exception as error:  # settings of another network surface as anything
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise RecipeError(
            f"{who} cannot be built: {reason}.\n  Fix: `task:` that the model has, or its files"
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the bars and notes of transformers in a block: what they report is raised or logged here."""
    library()
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
