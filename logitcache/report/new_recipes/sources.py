"""What the command line names: models with the facts of their weights, and a folder of images."""

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from logitcache.config.recipe import read_recipe
from logitcache.config.yaml_text import dump_inline
from logitcache.errors import DataError, RecipeError, did_you_mean
from logitcache.models import Timm, Torchvision, read_stored
from logitcache.models.base import PretrainedFacts
from logitcache.models.torchvision import imagenet_classes
from logitcache.store.remote.client import is_remote
from logitcache.student.runs.trained import Evaluation, EvaluationTransform, read_evaluation
from logitcache.views.augmentations.foreign import factories_of
from logitcache.views.datasets.image_folder import ImageFolder
from logitcache.views.datasets.images.class_folders import SPLITS

_LOOKED_AT = 16
_UNLIKE = ((300, 400), (400, 300))  # what brings images of both sizes to one does so with all


@dataclass(frozen=True)
class Source:
    """A model of the command line: its entry, its name, and what its weights were trained on."""

    entry: Mapping[str, object]
    name: str
    facts: PretrainedFacts
    size: tuple[int, int]
    class_names: tuple[str, ...] | None = None
    is_trained: bool = True
    began_random: bool = False

    @property
    def preprocessing(self) -> str:
        return dump_inline(self.facts.preprocessing.model_dump(mode="json", exclude_none=True))


@dataclass(frozen=True)
class Folder:
    """Images of a folder: data set entries to train and to validate on, their number, and why labels are not read.

    `class_names` are None if the teacher does not predict them; the folders may then be other classes. `longest_side`
    is that of the first few images, in pixels.
    """

    train: Mapping[str, object]
    validation: Mapping[str, object]
    num_images: int
    class_names: tuple[str, ...] | None
    has_other_classes: bool
    unlabelled_because: str
    split_because: str
    longest_side: int


def read_student(text: str, teacher: Source) -> Source:
    """Read a model to train: one with weights, or `small_cnn`, which begins with random ones at the teacher's size."""
    if text == "small_cnn":
        return replace(teacher, entry={"kind": text}, name=text, is_trained=False)
    return read_source("--student", text)


def read_source(option: str, text: str) -> Source:
    """Read a model that has weights. Raises RecipeError for what names none."""
    kind, _, name = text.partition(":")
    match kind:
        case "timm" if name:
            facts = Timm(name=name).pretrained_facts()
            return Source({"kind": kind, "name": name, "pretrained": True}, name, facts, _pretrained_size(facts))
        case "torchvision" if name:
            facts = Torchvision(name=name, weights="DEFAULT").pretrained_facts()
            return Source({"kind": kind, "name": name, "weights": "DEFAULT"}, name, facts, _pretrained_size(facts))
        case "run" if name:
            run = Path(name).expanduser()
            stored, recorded = read_stored(run / "model.json"), read_evaluation(run)
            size = stored.preprocessing.size or _evaluated_size(run, recorded, stored.in_channels)
            facts = PretrainedFacts(stored.num_classes, stored.preprocessing, max(size))
            names = None if recorded is None else recorded.class_names
            return Source({"kind": "run", "path": name}, run.name, facts, size, names, began_random=_began_random(run))
    more = "" if option != "--student" else ", or small_cnn"
    raise RecipeError(
        f"{option} {text!r} names no model. Fix: timm:NAME, torchvision:NAME or run:DIR, as in timm:resnet50.a1_in1k"
        + more
    )


def _began_random(run: Path) -> bool:
    """Return whether a run trained a network that has pretrained weights from random ones."""
    file = run / "recipe.yaml"
    model = (read_recipe(file).get("model") or {}) if file.is_file() else {}
    return model.get("weights", "") is None or model.get("pretrained") is False


def _pretrained_size(facts: PretrainedFacts) -> tuple[int, int]:
    return facts.preprocessing.size or (224, 224)


def _evaluated_size(run: Path, recorded: Evaluation | None, num_channels: int) -> tuple[int, int]:
    """Return the height and width of the images that a run was evaluated on, whatever those of the files."""
    if recorded is not None and not factories_of(recorded.augmentations):
        bring = EvaluationTransform(recorded.augmentations, num_channels)
        sizes = {tuple(bring(torch.zeros(num_channels, *size, dtype=torch.uint8)).shape[1:]) for size in _UNLIKE}
        if len(sizes) == 1:
            height, width = sizes.pop()
            return height, width
    raise RecipeError(
        f"{run} takes images of any size, and does not record one. Fix: logitcache recipe cp image_folder, and write "
        "the size and the run into these recipes; of synthesize, --set size=N"
    )


def require_folder(images: str) -> None:
    """Raise DataError unless images lie at a URL or in a folder that exists."""
    path = Path(images)
    if not is_remote(images) and not path.is_dir():
        beside: list[str] = []
        with suppress(OSError):
            beside = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
        raise DataError(
            f"--images {images!r}: {path.absolute()} does not exist, or is no folder.{did_you_mean(path.name, beside)} "
            "Fix: the folder of your images"
        )


def inspect_folder(images: str, teacher: Source) -> Folder:
    """Find out whether a folder is divided into splits and whether its folders are the teacher's classes."""
    roots, because = _roots(images), "the folders of the images"
    ours: tuple[Mapping[str, object], Mapping[str, object]] = ({}, {})
    if len(roots) == 1:
        roots, because = roots * 2, "nine images in ten; every tenth, in the order of their names, is for validation"
        ours = ({"split": "train"}, {"split": "validation"})
    names, why = _class_names(roots[0])
    if names is not None and len(names) != teacher.facts.num_classes:
        why = f"the folders are {len(names)} classes, {teacher.name} predicts {teacher.facts.num_classes}"
    elif names is not None and teacher.class_names not in (None, names) and not _are_imagenets(names, teacher):
        why = f"the folders are other classes than those that {teacher.name} predicts"
    labelled = names is not None and not why
    train, validation = (
        {"kind": "image_folder", "root": root, "labelled": labelled, **split, "orientation": "apply"}
        for root, split in zip(roots, ours, strict=True)
    )
    opened = ImageFolder.model_validate(train).open()
    count = len(opened.ids)
    side = max(max(opened.read(index).shape[1:]) for index in range(min(count, _LOOKED_AT)))
    ImageFolder.model_validate(validation).open()
    has_others = names is not None and len(names) > 1 and not labelled
    return Folder(train, validation, count, names if labelled else None, has_others, why, because, side)


def _are_imagenets(folders: tuple[str, ...], teacher: Source) -> bool:
    """Return whether folders have the numbers of WordNet, and a teacher the names of ImageNet's classes: one order."""
    numbered = all(re.fullmatch(r"n\d{8}", name) for name in folders)
    return numbered and teacher.class_names == imagenet_classes()


def _roots(images: str) -> list[str]:
    """Return the folder, or the folders of its training and validation images if it is divided into these."""
    if not is_remote(images) and Path(images).is_dir():
        folders = {path.name.lower(): str(path) for path in sorted(Path(images).iterdir()) if path.is_dir()}
        found = [next((folders[name] for name in names if name in folders), None) for names in (SPLITS[:2], SPLITS[2:])]
        if folders.keys() <= set(SPLITS) and None not in found:
            return [root for root in found if root is not None]
    return [images]


def _class_names(root: str) -> tuple[tuple[str, ...] | None, str]:
    """Return the classes of a folder, or why it has none."""
    try:
        return ImageFolder(root=root, labelled=True).open().class_names, ""
    except DataError as error:
        first = " ".join(str(error).partition("\n")[0].split())
        return None, first.partition(", and the data set is labelled")[0]  # which it is here alone
