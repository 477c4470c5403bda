"""Models from files: the shipped teacher, a checkpoint of the user's, a run of ours."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError
from torch import nn

from logitcache.errors import RecipeError
from logitcache.files import write_atomically
from logitcache.models.base import BuiltModel, Preprocessing, channels_fix
from logitcache.models.custom import Custom
from logitcache.models.small_cnn import SmallCNN
from logitcache.models.timm import Timm
from logitcache.models.torchvision import Torchvision
from logitcache.models.weights import load_weights, read_state, save_weights
from logitcache.recipe import Component, Count

Architecture = Annotated[SmallCNN | Torchvision | Timm | Custom, Field(discriminator="kind")]


class StoredModel(Component):
    """What `model.json` says of the weights beside it: enough to build the model again."""

    model: Architecture
    preprocessing: Preprocessing
    num_classes: Count
    in_channels: Count


def save_model(directory: Path, module: nn.Module, stored: StoredModel) -> None:
    """Write `model.json` and `weights.safetensors` into a run directory."""
    write_atomically(directory / "model.json", stored.model_dump_json(indent=2).encode() + b"\n")
    save_weights(directory / "weights.safetensors", module)


def read_stored(path: Path) -> StoredModel:
    """Read `model.json`. Raises RecipeError."""
    try:
        return StoredModel.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise RecipeError(
            f"{path.parent} is not a run: it has no {path.name}.\n"
            "  Fix: give the directory that train-student or train-teacher wrote."
        ) from error
    except (OSError, ValidationError) as error:
        raise RecipeError(f"{path} cannot be read: {error}\n  Fix: train again, or copy the run again.") from error


def load_model(directory: Path, factory: str | None = None) -> BuiltModel:
    """Build a run's network with its final weights. Raises RecipeError.

    `factory` is the user's own word for what builds a custom model: the stored one is never called.
    """
    return _load(directory / "model.json", directory / "weights.safetensors", factory)


def _load(description: Path, weights: Path, factory: str | None) -> BuiltModel:
    stored = read_stored(description)
    source = _trusted(stored.model, description, factory)
    if not weights.is_file():
        raise RecipeError(
            f"{weights.parent} holds no {weights.name}: its training has not ended.\n"
            "  Fix: run the same training again with --resume."
        )
    module = source.architecture().build(stored.num_classes, stored.in_channels).module
    load_weights(module, read_state(weights), str(weights))
    return BuiltModel(module, stored.preprocessing)


def _trusted(model: Architecture, description: Path, factory: str | None) -> Architecture:
    """Put the user's factory in the place of a stored one."""
    if not isinstance(model, Custom):
        if factory is not None:
            raise RecipeError(f"{description} is of kind {model.kind}, which needs no `factory`.\n  Fix: leave it out.")
        return model
    if factory is None:
        raise RecipeError(
            f"{description} names the factory '{model.factory}', and what a file names is never"
            " called.\n"
            f"  Fix: if you trust it, add to your recipe beside the path: factory: {model.factory}"
        )
    return model.model_copy(update={"factory": factory})


def _check_counts(stored: StoredModel, where: Path, num_classes: int | None, in_channels: int) -> None:
    if num_classes not in (None, stored.num_classes):
        raise RecipeError(
            f"the model in {where} predicts {stored.num_classes} classes, {num_classes} are asked"
            " for.\n"
            "  Fix: give a model that was trained on these classes."
        )
    if in_channels != stored.in_channels:
        raise RecipeError(
            f"the model in {where} takes {stored.in_channels} channels, the images have"
            f" {in_channels}.\n  Fix: {channels_fix(stored.in_channels)}"
        )


class Run(Component):
    """A run directory of ours: its final weights, its normalisation.

    A run of a custom model needs `factory` again: one that is stored in a file is never called.
    """

    kind: Literal["run"] = "run"
    path: str
    factory: str | None = None

    def build(self, num_classes: int | None, in_channels: int) -> BuiltModel:
        """Build the run's network with its final weights."""
        directory = Path(self.path).expanduser()
        stored = read_stored(directory / "model.json")
        _check_counts(stored, directory, num_classes, in_channels)
        return load_model(directory, self.factory)

    def risks(self) -> tuple[str, ...]:
        """Name the folder, and the function that builds the model if there is one."""
        function = () if self.factory is None else (f"the function '{self.factory}'",)
        return (f"the run '{self.path}'", *function)

    def architecture(self) -> Architecture:
        """Return the entry that the run was built from."""
        description = Path(self.path).expanduser() / "model.json"
        return _trusted(read_stored(description).model, description, self.factory)


class Bundled(Component):
    """The teacher that ships with the package, trained on Fashion-MNIST's 60,000 images."""

    kind: Literal["bundled"] = "bundled"
    name: Literal["fashion_mnist"] = "fashion_mnist"

    def build(self, num_classes: int | None, in_channels: int) -> BuiltModel:
        """Build the shipped teacher."""
        directory = bundled_directory(self.name)
        stored = read_stored(directory / "teacher.json")
        _check_counts(stored, directory, num_classes, in_channels)
        return _load(directory / "teacher.json", directory / "teacher.safetensors", None)

    def risks(self) -> tuple[str, ...]:
        """Name nothing: it reads the package's own files."""
        return ()

    def architecture(self) -> Architecture:
        """Return the entry that the shipped teacher was built from."""
        description = bundled_directory(self.name) / "teacher.json"
        return _trusted(read_stored(description).model, description, None)


class Checkpoint(Component):
    """The user's own weights in the architecture `model`: safetensors or a weights-only file.

    `key` is where in the file the weights are, when it holds several; `prefix` is dropped from
    the names that have it, and other names are left out. `num_classes` is what they predict, when
    that is not what the images' labels say. The preprocessing is the user's to give: a file of
    weights does not hold it.
    """

    kind: Literal["checkpoint"] = "checkpoint"
    model: Architecture
    path: str
    key: str | None = None
    prefix: str | None = None
    num_classes: Count | None = None

    def build(self, num_classes: int | None, in_channels: int) -> BuiltModel:
        """Build the architecture and load the file into it."""
        module = self.architecture().build(self.num_classes or num_classes, in_channels).module
        path = Path(self.path).expanduser()
        load_weights(module, read_state(path, self.key, self.prefix), str(path))
        return BuiltModel(module, None)

    def risks(self) -> tuple[str, ...]:
        """Name the file, and what the architecture names."""
        return (f"the checkpoint '{self.path}'", *self.model.risks())

    def architecture(self) -> Architecture:
        """Return the architecture with random weights."""
        return self.model.architecture()


def bundled_directory(name: str) -> Path:
    """Find data that ships with the package: inside it when installed, beside it in a checkout."""
    package = Path(__file__).parent.parent
    inside = package / "data" / name
    return inside if inside.is_dir() else package.parent / "data" / name
