"""New recipes for a folder of one's own: a teacher over its images, and a student from the cache."""

import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from logitcache.config.shipped_recipes import write_recipes
from logitcache.config.yaml_text import dump_inline
from logitcache.errors import DataError, RecipeError
from logitcache.models import Timm, Torchvision, read_stored
from logitcache.models.base import PretrainedFacts
from logitcache.runtime.console import logger
from logitcache.runtime.tables import format_bytes
from logitcache.store.remote.client import is_remote
from logitcache.student.runs.trained import Evaluation, EvaluationTransform, read_evaluation
from logitcache.views.augmentations.foreign import factories_of
from logitcache.views.datasets.image_folder import ImageFolder
from logitcache.views.datasets.images.class_folders import SPLITS

NUM_VIEWS = 8
BATCH_SIZE = 64
STEPS = 4000
"""Optimiser steps of a student, if that is 2 to 8 times `NUM_VIEWS` epochs."""
MOST_BYTES = 1 << 30
"""The largest cache of all logits that is kept whole."""
TOP_K = 100
_UNLIKE = ((300, 400), (400, 300))  # what brings images of both sizes to one does so with all
MOST_WORKERS = 8


@dataclass(frozen=True)
class NewRecipes:
    """The files that were written, in the order of their use, and what they were made for."""

    files: list[str]
    num_images: int
    labelled: bool
    teacher_classes: int
    view_size: tuple[int, int]


@dataclass(frozen=True)
class _Source:
    """A model of the command line: its entry, its name, and what its weights were trained on."""

    entry: Mapping[str, object]
    name: str
    facts: PretrainedFacts
    size: tuple[int, int]
    class_names: tuple[str, ...] | None = None

    @property
    def preprocessing(self) -> str:
        return dump_inline(self.facts.preprocessing.model_dump(mode="json", exclude_none=True))


@dataclass(frozen=True)
class _Folder:
    """Images of a folder: data set entries to train and to validate on, their number, and why labels are not read."""

    train: Mapping[str, object]
    validation: Mapping[str, object]
    num_images: int
    class_names: tuple[str, ...] | None
    unlabelled_because: str
    split_because: str


def new_recipes(images: str, teacher: str, student: str, out: Path | None = None) -> NewRecipes:
    """Write recipes for the images of a folder; `teacher` and `student` are timm:NAME, torchvision:NAME or run:DIR.

    The files are a precompute recipe, one more for validation images if these have no labels of the teacher's classes,
    and a student recipe. Raises RecipeError for unknown models and for files that exist, DataError for a folder
    without images.
    """
    taught, learner = _source("--teacher", teacher), _source("--student", student)
    folder = _folder(images, taught)
    called = images.rstrip("/").rpartition("/")[2] if out is None else out.name
    name = re.sub(r"[^A-Za-z0-9-]+", "_", called).strip("_") or "photos"
    out = Path("pipelines") / name if out is None else out
    again = shlex.join(["recipe", "new", "--images", images, "--teacher", teacher, "--student", student])
    texts = {out / "precompute.yaml": _precompute(folder, taught, name, out, again)}
    if folder.class_names is None:
        logger.info(f"labels are not read: {folder.unlabelled_because or 'the folder has no classes'}")
        texts[out / "precompute_validation.yaml"] = _precompute_validation(folder, taught, name, out)
    texts[out / "student.yaml"] = _student(folder, taught, learner, name, out)
    write_recipes(texts)
    files = [str(file) for file in texts]
    return NewRecipes(files, folder.num_images, folder.class_names is not None, taught.facts.num_classes, taught.size)


def _source(option: str, text: str) -> _Source:
    kind, _, name = text.partition(":")
    match kind:
        case "timm" if name:
            facts = Timm(name=name).pretrained_facts()
            return _Source({"kind": kind, "name": name, "pretrained": True}, name, facts, _pretrained_size(facts))
        case "torchvision" if name:
            facts = Torchvision(name=name, weights="DEFAULT").pretrained_facts()
            return _Source({"kind": kind, "name": name, "weights": "DEFAULT"}, name, facts, _pretrained_size(facts))
        case "run" if name:
            run = Path(name).expanduser()
            stored, recorded = read_stored(run / "model.json"), read_evaluation(run)
            size = stored.preprocessing.size or _evaluated_size(run, recorded, stored.in_channels)
            facts = PretrainedFacts(stored.num_classes, stored.preprocessing, max(size))
            names = None if recorded is None else recorded.class_names
            return _Source({"kind": "run", "path": name}, run.name, facts, size, names)
    raise RecipeError(
        f"{option} {text!r} names no model. Fix: timm:NAME, torchvision:NAME or run:DIR, as in timm:resnet50.a1_in1k"
    )


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
        "the size and the run into these recipes"
    )


def _folder(images: str, teacher: _Source) -> _Folder:
    """Find out whether a folder is divided into splits and whether its folders are the teacher's classes."""
    roots, because = _roots(images), "the folders of the images"
    ours: tuple[Mapping[str, object], Mapping[str, object]] = ({}, {})
    if len(roots) == 1:
        roots, because = roots * 2, "nine images in ten; every tenth, in the order of their names, is for validation"
        ours = ({"split": "train"}, {"split": "validation"})
    names, why = _class_names(roots[0])
    if names is not None and len(names) != teacher.facts.num_classes:
        why = f"the folders are {len(names)} classes, {teacher.name} predicts {teacher.facts.num_classes}"
    elif names is not None and teacher.class_names not in (None, names):
        why = f"the folders are other classes than those that {teacher.name} predicts"
    labelled = names is not None and not why
    train, validation = (
        {"kind": "image_folder", "root": root, "labelled": labelled, **split, "orientation": "apply"}
        for root, split in zip(roots, ours, strict=True)
    )
    count = len(ImageFolder.model_validate(train).open().ids)
    ImageFolder.model_validate(validation).open()
    return _Folder(train, validation, count, names if labelled else None, why, because)


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
        return None, " ".join(str(error).partition("\n")[0].split())


def _precompute(folder: _Folder, teacher: _Source, name: str, out: Path, again: str) -> str:
    classes, count = teacher.facts.num_classes, folder.num_images
    dense = 2 * classes * NUM_VIEWS * count
    if dense <= MOST_BYTES:
        encoding: dict[str, object] = {"kind": "dense"}
        why = f"every logit in float16: {format_bytes(dense)} for {count:,} images"
    else:
        encoding = {"kind": "top_k", "k": min(TOP_K, classes)}
        kept = format_bytes((4 * TOP_K + 12) * NUM_VIEWS * count)
        why = f"the {TOP_K} most probable classes: {kept}; all are {format_bytes(dense)}"
    labels = "the folders are the teacher's classes" if folder.class_names else f"not read: {folder.unlabelled_because}"
    return f"""\
# yaml-language-server: $schema=schemas/precompute.json
# Run {teacher.name} once over {NUM_VIEWS} views of each of {count:,} images.
#   logitcache precompute {out / "precompute.yaml"}
# First: logitcache plan {out / "precompute.yaml"}, for bytes, time, memory and break-even.
# Made by: logitcache {again}
cache: {dump_inline(f"caches/{name}.zarr")}
dataset:
{_dataset(folder.train, labels, folder.split_because)}
views:
  # Augmented copies of every image. More views need more teacher passes and give the student more variety.
  num_views: {NUM_VIEWS}
  augmentations:
    # The size that {teacher.name} takes. A crop of less than a quarter shows it too little of an image.
    - {{kind: random_resized_crop, size: {_square(teacher.size)}, scale: [0.25, 1.0]}}
    # Remove it if left and right differ in meaning, as in text.
    - {{kind: horizontal_flip}}
{_teacher(teacher)}
    # {why[0].upper()}{why[1:]}.
    logits: {dump_inline(encoding)}
batch_size: {BATCH_SIZE}  # images per forward pass; lower it if memory runs out
num_workers: {_workers()}  # processes that decode and augment: one per CPU core, 8 at most
"""


def _precompute_validation(folder: _Folder, teacher: _Source, name: str, out: Path) -> str:
    return f"""\
# yaml-language-server: $schema=schemas/precompute.json
# Run {teacher.name} on the validation images, to measure how often the student agrees with it.
#   logitcache precompute {out / "precompute_validation.yaml"}
cache: {dump_inline(f"caches/{name}-validation.zarr")}
dataset:
{_dataset(folder.validation, "as in precompute.yaml", "the images that precompute.yaml leaves out")}
views:
  # One view without chance: the centre of the image, as {teacher.name} is evaluated.
  augmentations:
    - {{kind: resize, size: {teacher.facts.resize}}}
    - {{kind: center_crop, size: {_square(teacher.size)}}}
{_teacher(teacher)}
batch_size: {BATCH_SIZE}
num_workers: {_workers()}
"""


def _teacher(teacher: _Source) -> str:
    key = re.sub(r"\W+", "_", teacher.name, flags=re.ASCII).strip("_")[:64]
    return f"""\
teachers:
  {dump_inline(key)}:
    model: {dump_inline(teacher.entry)}
    # As in training: recorded with the weights.
    preprocessing: {teacher.preprocessing}"""


def _student(folder: _Folder, teacher: _Source, student: _Source, name: str, out: Path) -> str:
    rounds = min(8, max(2, round(STEPS * BATCH_SIZE / folder.num_images / NUM_VIEWS)))
    epochs = rounds * NUM_VIEWS
    steps = epochs * -(-folder.num_images // BATCH_SIZE)
    random = {"timm": " (pretrained: false)", "torchvision": " (weights: null)"}.get(str(student.entry["kind"]), "")
    own = student.facts.num_classes == teacher.facts.num_classes
    model = student.entry if own else {**student.entry, "new_head": True}
    head = "" if own else f", but the last layer: {teacher.facts.num_classes} classes, not {student.facts.num_classes}"
    if folder.class_names is None:
        validation = f"""\
# Images without labels of the teacher's classes: measure how often the student agrees with the teacher.
validation: {dump_inline({"cache": f"caches/{name}-validation.zarr"})}"""
    else:
        validation = f"""\
# Top-1 accuracy on images that neither stage trains on, at the size that {student.name} takes.
validation:
  dataset: {dump_inline(folder.validation)}
  augmentations:
    - {{kind: resize, size: {student.facts.resize}}}
    - {{kind: center_crop, size: {_square(student.size)}}}"""
    return f"""\
# yaml-language-server: $schema=schemas/train-student.json
# Train {student.name} to answer as {teacher.name} does, from the cache alone.
#   logitcache train-student {out / "student.yaml"}
# Afterwards: logitcache evaluate {shlex.quote(f"runs/{name}")}
out: {dump_inline(f"runs/{name}")}
cache: {dump_inline(f"caches/{name}.zarr")}
# Weights that are trained{head}: on few images far better than random ones{random}.
model: {dump_inline(model)}
# As in its training.{" Views of another size are resized for it." * (student.facts.preprocessing.size is not None)}
preprocessing: {student.preprocessing}
losses:
  # Temperature 1: higher ones lost accuracy for short runs and small students. Compare with 2 and 4.
  - {{kind: kl_divergence, temperature: 1.0}}
epochs: {epochs}  # the {NUM_VIEWS} views {rounds} times each: {steps:,} steps; the teacher's answers cost nothing more
batch_size: {BATCH_SIZE}
optimizer: {{kind: adamw, lr: 5e-4}}  # half the default: pretrained weights need smaller steps
schedule: {{warmup_epochs: 1}}  # the first steps move pretrained weights least
num_workers: {_workers()}  # processes that decode and augment: one per CPU core, 8 at most
{validation}
"""


def _dataset(entry: Mapping[str, object], labels: str, split: str) -> str:
    because = {"labelled": labels, "split": split, "orientation": "turn photographs as their Exif tag says"}
    if "split" not in entry:
        because["root"] = split
    lines = (
        f"  {key}: {dump_inline(value)}" + (f"  # {because[key]}" if key in because else "")
        for key, value in entry.items()
    )
    return "\n".join(lines)


def _workers() -> int:
    return min(MOST_WORKERS, os.cpu_count() or 1)


def _square(size: tuple[int, int]) -> str:
    return dump_inline(size[0] if size[0] == size[1] else list(size))
