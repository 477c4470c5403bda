"""Torchvision: any image classification set of torchvision.datasets, by the name of its class."""

import contextlib
import functools
import inspect
import sys
from pathlib import Path
from typing import Literal, cast

import PIL
from PIL import Image
from pydantic import Field
from torch import Tensor

from logitcache.errors import DataError, LogitCacheError, RecipeError, did_you_mean
from logitcache.store import digest_index
from logitcache.views.datasets.base import DatasetBase
from logitcache.views.datasets.custom import class_names_of
from logitcache.views.datasets.images import torchvision_files
from logitcache.views.datasets.images.ids import NumberedIds
from logitcache.views.datasets.images.pixels import Mode, from_pil
from logitcache.views.datasets.map_style import MapImages, MapStyle, num_items
from logitcache.views.datasets.scan_memory import ScanMemory

Scalar = str | int | float | bool | None
_OURS = {"self", "root", "download", "transform", "target_transform", "transforms", "loader"}
_TRAIN = {"train": True, "test": False}


class Torchvision(DatasetBase):
    """A class of torchvision.datasets, by its name.

    MNIST, FashionMNIST, KMNIST, CIFAR10 and CIFAR100 are read without unpickling code.
    """

    kind: Literal["torchvision"] = "torchvision"
    name: str = Field(description="Class of torchvision.datasets.", examples=["CIFAR10"])
    root: str | None = Field(
        default=None, description="Folder of its files, the argument `root` of the class.", examples=["datasets"]
    )
    split: str | None = Field(
        default=None,
        description="Value of the class's `train` (`train` or `test`) or `split`, whichever it has; by default the "
        "class's own default.",
        examples=["train"],
    )
    download: bool = Field(
        default=False, description="Whether missing files are downloaded; nothing is downloaded otherwise."
    )
    mode: Mode = "RGB"
    options: dict[str, Scalar | tuple[Scalar, ...]] = Field(default={}, description="Further arguments of the class.")

    def risks(self) -> tuple[str, ...]:
        """Name a class that torchvision alone reads: several unpickle files, or read without a bound."""
        named = () if self.name in torchvision_files.NAMES else (f"torchvision's {self.name}",)
        options = [name for name in self.options if name not in torchvision_files.OPTIONS]
        return (*named, *(f"the option {name}" for name in options))

    def open(self) -> MapImages:
        """Open the files; raises RecipeError for wrong arguments, DataError for missing data."""
        import torchvision  # imports torch's compiler, for seconds

        made = _class_named(self.name)
        arguments = self._arguments(_parameters(made))
        root = cast(str | None, arguments.get("root"))
        opened_ns = digest_index.now_ns()
        train = bool(arguments.get("train", True))
        if root is not None and self.name in torchvision_files.NAMES:
            if self.download:
                _built(made, arguments, self.download)
            files = torchvision_files.files_of(self.name, train)
            source: MapStyle = torchvision_files.read_split(self.name, Path(root), train)
        else:
            files, source = None, cast(MapStyle, _built(made, arguments, self.download))
        what = f"torchvision's {self.name}"
        stored = self.model_dump_json(exclude={"root", "download"})
        identity = f"{stored} {torchvision.__version__} {PIL.__version__}"
        return MapImages(
            source,
            what,
            NumberedIds(f"{self.split}/" if self.split else "", num_items(source, what)),
            functools.partial(_decoded, mode=self.mode),
            class_names=class_names_of(source),
            memory=ScanMemory(Path(root), identity, opened_ns, files) if root else None,
        )

    def _arguments(self, parameters: set[str]) -> dict[str, object]:
        """Return the arguments of the class; raises RecipeError for what it does not take."""
        arguments: dict[str, object] = dict(self.options)
        if "root" in parameters:
            if self.root is None:
                raise RecipeError(f"{self.name} reads files. Set root to the folder that holds them.")
            arguments["root"] = str(Path(self.root).expanduser().absolute())
        if self.download:
            if "download" not in parameters:
                raise RecipeError(
                    f"torchvision does not download {self.name}. Fetch it by hand and leave out download."
                )
            arguments["download"] = True
        named = next((name for name in ("train", "split") if name in parameters), "")
        known = parameters - _OURS - ({named} if self.split is not None else set())
        if self.split is not None:
            if not named:
                raise RecipeError(f"{self.name} is not divided into splits. Leave out split.")
            if named == "train" and self.split not in _TRAIN:
                raise RecipeError(f"{self.name} has no split '{self.split}': set train or test.")
            arguments[named] = _TRAIN[self.split] if named == "train" else self.split
        for name in self.options:
            if name not in known:
                listed = ", ".join(sorted(known)) or "none"
                raise RecipeError(f"{self.name} has no option '{name}' (it has: {listed}).{did_you_mean(name, known)}")
        return arguments


def _decoded(image: object, mode: Mode) -> Tensor:
    if not isinstance(image, Image.Image):
        raise ValueError(f"it is of type {type(image).__name__}, not an image")
    return from_pil(image, mode)


def _class_named(name: str) -> type:
    from torchvision import datasets

    known = [each for each in datasets.__all__ if inspect.isclass(getattr(datasets, each)) and each != "VisionDataset"]
    if name not in known:
        raise RecipeError(f"torchvision.datasets has no '{name}'.{did_you_mean(name, known)}")
    return cast(type, getattr(datasets, name))


def _parameters(made: type) -> set[str]:
    """Return the names of a class's arguments, with those it passes on to its bases."""
    names: set[str] = set()
    for owner in inspect.getmro(made):
        parameters = inspect.signature(owner).parameters.values()
        names |= {each.name for each in parameters if each.kind != each.VAR_KEYWORD}
        if all(each.kind != each.VAR_KEYWORD for each in parameters):
            break
    return names


def _built(made: type, arguments: dict[str, object], download: bool) -> object:
    name = made.__name__
    try:
        # What it prints must not mix with the result that goes to standard output.
        with contextlib.redirect_stdout(sys.stderr):
            built: object = made(**arguments)
        return built
    except LogitCacheError:
        raise
    except ImportError as cause:
        raise RecipeError(f"{name} needs a package that is not installed: {cause}") from cause
    except (TypeError, ValueError) as cause:
        raise RecipeError(f"{name} does not take these arguments: {cause}") from cause
    except Exception as cause:  # torchvision raises RuntimeError, OSError and what parsers raise
        fix = (
            "check the network, or put the files there by hand."
            if download
            else "correct root, or set download: true if torchvision can fetch it."
        )
        raise DataError(
            f"{name} cannot be opened in '{arguments.get('root')}': {str(cause).strip() or repr(cause)}\n  Fix: {fix}"
        ) from cause
