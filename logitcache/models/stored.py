"""Models from files: the shipped teacher, a checkpoint of the user's, a run of ours."""

import hashlib
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, ValidationError, model_validator
from torch import nn

from logitcache.classifier import Preprocessing, channels_fix
from logitcache.config.recipe import Component, Count
from logitcache.config.trust import Trust, remember, require_grant
from logitcache.errors import RecipeError
from logitcache.models.base import BuiltModel
from logitcache.models.bounded import Held, TooLarge, held_in, require_buildable, require_used
from logitcache.models.custom import Custom
from logitcache.models.pruning.pruned_network import Network, PrunedNetwork
from logitcache.models.quantization.quantized import Quantized
from logitcache.models.timm import Timm
from logitcache.models.torchvision import Torchvision
from logitcache.models.weights import load_weights, read_state, save_weights
from logitcache.runtime.shipped_files import shipped_folder
from logitcache.store.files import write_atomically
from logitcache.store.safe_files import read_bounded

_MAX_BYTES = 1 << 20
_MOST_SIDE, _MOST_COUNT = 2048, 1 << 20
"""Pixels of a side, and classes or channels, of a network that a file describes; of its options, all in all, too."""
_TIMES, _TIMES_PRUNED = 4, 16
"""How many values a network may take while it is built, for each in the file: some constructors replace layers."""

Architecture = Annotated[Network | PrunedNetwork | Quantized, Field(discriminator="kind")]


def unwrapped(model: Architecture) -> Network:
    """Return the architecture of a network before it was pruned or quantised."""
    while isinstance(model, PrunedNetwork | Quantized):
        model = model.model
    return model


class StoredModel(Component):
    """The content of `model.json`: enough to build the model of the weights beside it.

    `model` is None for a module that the caller passed to `train`.
    """

    model: Architecture | None
    preprocessing: Preprocessing
    num_classes: Annotated[Count, Field(le=_MOST_COUNT)]
    in_channels: Annotated[Count, Field(le=_MOST_COUNT)]

    @property
    def network(self) -> Architecture | None:
        """The entry of the network before it was pruned or quantised."""
        return None if self.model is None else unwrapped(self.model)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(self.preprocessing.mean) != self.in_channels:
            raise ValueError(f"{len(self.preprocessing.mean)} means for {self.in_channels} channels")
        if max(self.preprocessing.size or (0,)) > _MOST_SIDE:
            raise ValueError(f"input_size {self.preprocessing.size} is above {_MOST_SIDE}")
        if isinstance(self.network, Timm | Torchvision) and _extent(self.network.options) > _MOST_COUNT:
            raise ValueError(f"the numbers in its options add up to more than {_MOST_COUNT}")
        return self


def _extent(value: JsonValue) -> float:
    """Add up the numbers in options, and count their entries: constructors make lists as long as that."""
    if isinstance(value, int | float):
        return abs(value)
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(1 + _extent(item) for item in items)


def save_model(directory: Path, module: nn.Module, stored: StoredModel) -> None:
    """Write `model.json` and `weights.safetensors` into a run directory."""
    description = stored.model_dump_json(indent=2).encode() + b"\n"
    write_atomically(directory / "model.json", description)
    save_weights(directory / "weights.safetensors", module)
    remember(hashlib.sha256(description).hexdigest())


def read_stored(path: Path) -> StoredModel:
    """Read `model.json`. Raises RecipeError."""
    return _read(path)[0]


def _read(path: Path) -> tuple[StoredModel, str]:
    """Read a description, and its digest."""
    try:
        content = read_bounded(path, _MAX_BYTES)
        return StoredModel.model_validate_json(content), hashlib.sha256(content).hexdigest()
    except FileNotFoundError as error:
        if (path.parent / "recipe.yaml").is_file():
            raise RecipeError(
                f"{path.parent} is a run that has not finished: it has no {path.name}.\n"
                "  Fix: wait for the command that began it; if it has stopped, run the same command with --resume."
            ) from error
        raise RecipeError(
            f"{path.parent} is not a run: it has no {path.name}.\n"
            "  Fix: give the directory that train-student or train-teacher wrote."
        ) from error
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc'])) or 'all of it'}: {e['msg']}" for e in error.errors()[:3]]
        raise _unreadable(path, "; ".join(lines)) from error
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, reason: object) -> RecipeError:
    return RecipeError(f"{path} cannot be read: {reason}\n  Fix: train again, or copy the run again.")


def load_model(directory: Path, factory: str | None = None, trust: Collection[str] = ()) -> BuiltModel:
    """Build a run's network with its final weights. Raises RecipeError.

    `factory` is the user's own name of the function that builds a custom model: the stored one is never called. `trust`
    has the digests of descriptions that may name more than the allow-list.
    """
    return _load(directory / "model.json", directory / "weights.safetensors", factory, trust)


def _load(description: Path, weights: Path, factory: str | None = None, trust: Collection[str] = ()) -> BuiltModel:
    stored, source, held = _described(description, weights, factory, trust)
    try:
        module = source.build(stored.num_classes, stored.in_channels).module
        require_used(module, held)
    except TooLarge as error:
        raise _unreadable(weights, f"{description.name} is of another network: {error}") from error
    except (OverflowError, ArithmeticError, LookupError, RuntimeError) as error:
        raise _unreadable(description, f"its model cannot be built: {error}") from error
    load_weights(module, read_state(weights), str(weights))
    return BuiltModel(module, stored.preprocessing)


def load_into(directory: Path, module: nn.Module) -> BuiltModel:
    """Load a run's final weights into the caller's own module, in place. Raises RecipeError if they do not fit."""
    stored, weights = read_stored(directory / "model.json"), directory / "weights.safetensors"
    _held_in(weights)
    load_weights(module, read_state(weights), str(weights))
    return BuiltModel(module, stored.preprocessing)


def _described(
    description: Path, weights: Path, factory: str | None, trust: Collection[str]
) -> tuple[StoredModel, Architecture, Held]:
    """Read a run's description and how much its weights hold; raise unless the one may be built and fits the other."""
    stored, digest = _read(description)
    source = _trusted(stored.model, description, factory).architecture()
    held = _held_in(weights)
    network = source.model if isinstance(source, Quantized) else source
    if isinstance(unwrapped(source), Custom):
        return stored, source, held  # the user's own code
    beside = f"beside the path in a recipe: trust: {digest}"
    require_grant(source.risks(), digest, trust, str(description), beside)
    try:
        times = _TIMES_PRUNED if isinstance(network, PrunedNetwork) else _TIMES
        require_buildable(partial(network.build, stored.num_classes, stored.in_channels), held, times)
    except TooLarge as error:
        raise _unreadable(description, f"it describes another network than {weights.name} holds: {error}") from error
    return stored, source, held


def _held_in(weights: Path) -> Held:
    """Read how much a run's weights hold. Raises RecipeError."""
    try:
        return held_in(weights)
    except FileNotFoundError:
        raise RecipeError(
            f"{weights.parent} holds no {weights.name}: its training has not ended.\n"
            "  Fix: run the same training again with --resume."
        ) from None
    except (OSError, ValueError) as error:
        raise _unreadable(weights, error) from error


def _trusted(model: Architecture | None, description: Path, factory: str | None) -> Architecture:
    """Replace a stored factory by the user's own."""
    if isinstance(model, PrunedNetwork | Quantized):
        return model.model_copy(update={"model": _trusted(model.model, description, factory)})
    if model is not None and not isinstance(model, Custom):
        if factory is not None:
            raise RecipeError(f"{description} is of kind {model.kind}, which needs no `factory`.\n  Fix: leave it out.")
        return model
    if factory is not None:
        return Custom(factory=factory) if model is None else model.model_copy(update={"factory": factory})
    if model is None:
        raise RecipeError(
            f"{description} is of a module that was passed to train, and names no model.\n"
            "  Fix: load_student(run, model=module); or, beside the path in a recipe, factory: pkg.mod:function"
        )
    raise RecipeError(
        f"{description} names the factory '{model.factory}', and a factory that a file names is never called.\n"
        f"  Fix: if you trust it, add to your recipe beside the path: factory: {model.factory}"
    )


def _require_counts(description: Path, num_classes: int | None, in_channels: int) -> None:
    """Raise RecipeError if a stored model predicts other classes or takes other channels."""
    stored = read_stored(description)
    if num_classes not in (None, stored.num_classes):
        raise RecipeError(
            f"the model in {description.parent} predicts {stored.num_classes} classes, {num_classes} are asked for.\n"
            "  Fix: give a model that was trained on these classes."
        )
    if in_channels != stored.in_channels:
        raise RecipeError(
            f"the model in {description.parent} takes {stored.in_channels} channels, the images have {in_channels}.\n"
            f"  Fix: {channels_fix(stored.in_channels)}"
        )


class OfRun(Component):
    """A run of `train-student` or `train-teacher`, whose network a recipe's model begins with."""

    path: str = Field(description="Folder of the run.", examples=["runs/teacher"])
    factory: str | None = Field(
        default=None,
        description="Function that builds the model of a run with a `custom` model, as `package.module:function`; a "
        "function named in a file is never called.",
        examples=["mypackage.models:student"],
    )
    trust: Trust = Field(
        default=(),
        description="Digest of a `model.json` that names more than the allow-list; the error prints it.",
        examples=[["9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"]],
    )

    def build(self, num_classes: int | None, in_channels: int) -> BuiltModel:
        """Build the run's network with its final weights."""
        _require_counts(self._files[0], num_classes, in_channels)
        return _load(*self._files, self.factory, self.trust)

    @property
    def _files(self) -> tuple[Path, Path]:
        directory = Path(self.path).expanduser()
        return directory / "model.json", directory / "weights.safetensors"

    def stored(self) -> StoredModel:
        """Read the run's description. Raises RecipeError."""
        return read_stored(self._files[0])

    def risks(self) -> tuple[str, ...]:
        """Name the folder, and the function that builds the model if there is one."""
        function = () if self.factory is None else (f"the function '{self.factory}'",)
        return (f"the run '{self.path}'", *function)

    def parent(self) -> dict[str, str]:
        """Return the digest of the weights that training starts from, which a continuation must not change.

        Raises RecipeError if they are gone.
        """
        description, weights = self._files
        read_stored(description)
        _held_in(weights)
        with open(weights, "rb") as file:
            return {"weights": hashlib.file_digest(file, "sha256").hexdigest()}

    def architecture(self) -> Architecture:
        """Return the entry that the run was built from."""
        return _described(*self._files, self.factory, self.trust)[1]


class Run(OfRun):
    """The model of a run of `train-student` or `train-teacher`, with its final weights and normalisation."""

    kind: Literal["run"] = "run"


class Bundled(Component):
    """The teacher that ships with the package, trained on Fashion-MNIST's 60,000 images."""

    kind: Literal["bundled"] = "bundled"
    name: Literal["fashion_mnist"] = Field(default="fashion_mnist", description="Name of the teacher.")

    def build(self, num_classes: int | None, in_channels: int) -> BuiltModel:
        """Build the shipped teacher."""
        _require_counts(self._description, num_classes, in_channels)
        return _load(self._description, self._description.with_suffix(".safetensors"))

    @property
    def _description(self) -> Path:
        return bundled_directory(self.name) / "teacher.json"

    def risks(self) -> tuple[str, ...]:
        """Name nothing: it reads the package's own files."""
        return ()

    def architecture(self) -> Architecture:
        """Return the entry that the shipped teacher was built from."""
        return _trusted(read_stored(self._description).model, self._description, None)


def bundled_directory(name: str) -> Path:
    """Return the folder of bundled images and their teacher."""
    return shipped_folder("data") / name
