"""The texts of new recipes."""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from logitcache.config.yaml_text import dump_inline
from logitcache.report.new_recipes.sources import Folder, Source
from logitcache.runtime.device import num_cores, resolve_device
from logitcache.runtime.tables import format_bytes

NUM_VIEWS = 8
BATCH_SIZE = 64
STEPS = 4000
"""Optimiser steps of a student, if that is 2 to 8 times `NUM_VIEWS` epochs."""
MOST_BYTES = 1 << 30
"""The largest cache of all logits that is kept whole."""
TOP_K = 100
MOST_WORKERS = 8
LEAST_TIMED = 4000
"""Rows of a cache from which on a faster variant of the teacher gains more than it takes to find: some 300 passes."""
LARGE = 8
"""Photographs whose side is so many times that of a view are decoded at a part of their size."""


def precompute_text(folder: Folder, teacher: Source, name: str, out: Path, again: str) -> str:
    """Return the recipe of the cache; `again` is the command that makes it."""
    classes, count = teacher.facts.num_classes, folder.num_images
    dense, kept = 2 * classes * NUM_VIEWS * count, (4 * TOP_K + 12) * NUM_VIEWS * count
    if dense <= max(MOST_BYTES, kept):
        encoding: dict[str, object] = {"kind": "dense"}
        why = f"every logit in float16: {format_bytes(dense)} for {count:,} images"
    else:
        encoding = {"kind": "top_k", "k": TOP_K}
        why = f"the {TOP_K} most probable classes: {format_bytes(kept)}; all are {format_bytes(dense)}"
    labels = "the folders are the teacher's classes" if folder.class_names else f"not read: {folder.unlabelled_because}"
    return f"""\
# yaml-language-server: $schema=schemas/precompute.json
# Run {teacher.name} once over {NUM_VIEWS} views of each of {count:,} images.
#   logitcache precompute {_quoted(out / "precompute.yaml")}
# First: logitcache plan {_quoted(out / "precompute.yaml")}, for bytes, time, memory and break-even.
# Made by: logitcache {again}
cache: {dump_inline(f"caches/{name}.zarr")}
dataset:
{_dataset(folder.train, labels, folder.split_because)}
views:{_decode(folder, teacher)}
  # Augmented copies of every image. More views need more teacher passes and give the student more variety.
  num_views: {NUM_VIEWS}
  augmentations:
    # The size that {teacher.name} takes. A crop of less than a quarter shows it too little of an image.
    - {{kind: random_resized_crop, size: {_square(teacher.size)}, scale: [0.25, 1.0]}}
    # Remove it if left and right differ in meaning, as in text.
    - {{kind: horizontal_flip}}
{_teacher(teacher)}{_speed(NUM_VIEWS * count)}
    # {why[0].upper()}{why[1:]}.
    logits: {dump_inline(encoding)}
batch_size: {_forward_pass()}
num_workers: {_workers()}  # processes that decode and augment: one per CPU core, 8 at most
"""


def precompute_validation_text(folder: Folder, teacher: Source, name: str, out: Path) -> str:
    """Return the recipe of a cache of the validation images, to measure agreement on."""
    return f"""\
# yaml-language-server: $schema=schemas/precompute.json
# Run {teacher.name} on the validation images, to measure how often the student agrees with it.
#   logitcache precompute {_quoted(out / "precompute_validation.yaml")}
cache: {dump_inline(f"caches/{name}-validation.zarr")}
dataset:
{_dataset(folder.validation, "as in precompute.yaml", "the images that precompute.yaml leaves out")}
views:{_decode(folder, teacher)}
  # One view without chance: the centre of the image, as {teacher.name} is evaluated.
  augmentations:
    - {{kind: resize, size: {teacher.facts.resize}}}
    - {{kind: center_crop, size: {_square(teacher.size)}}}
{_teacher(teacher)}
batch_size: {_forward_pass()}
num_workers: {_workers()}
"""


def teacher_text(folder: Folder, teacher: Source, name: str, out: Path, images: str, student: str) -> str:
    """Return the recipe that trains the teacher on classes that it does not predict yet."""
    run = f"runs/{name}-teacher"
    then = ["recipe", "new", "--images", images, "--teacher", f"run:{run}", "--student", student]
    train, validation = ({**entry, "labelled": True} for entry in (folder.train, folder.validation))
    return f"""\
# yaml-language-server: $schema=schemas/train-teacher.json
# Train {teacher.name} on the classes of the folder, which it does not predict.
#   logitcache train-teacher {_quoted(out / "teacher.yaml")}
# Then its run is the teacher of new recipes, which read the labels:
#   logitcache {shlex.join([*then, "--out", f"{out}-classes"])}
out: {dump_inline(run)}
dataset:
{_dataset(train, "the folders are the classes", folder.split_because)}
augmentations:
  - {{kind: random_resized_crop, size: {_square(teacher.size)}, scale: [0.25, 1.0]}}
  - {{kind: horizontal_flip}}
# Weights that are trained, but the last layer.
model: {dump_inline({**teacher.entry, "new_head": True})}
preprocessing: {teacher.preprocessing}
epochs: 20
batch_size: {BATCH_SIZE}
optimizer: {{kind: adamw, lr: 2e-4}}  # a fifth of the default: pretrained weights need smaller steps
schedule: {{warmup_epochs: 1}}
num_workers: {_workers()}  # processes that decode and augment: one per CPU core, 8 at most
validation:
  dataset: {dump_inline(validation)}
  augmentations:
    - {{kind: resize, size: {teacher.facts.resize}}}
    - {{kind: center_crop, size: {_square(teacher.size)}}}
"""


def _teacher(teacher: Source) -> str:
    key = re.sub(r"\W+", "_", teacher.name, flags=re.ASCII).strip("_")[:64]
    return f"""\
teachers:
  {dump_inline(key)}:
    model: {dump_inline(teacher.entry)}
    # As in training: recorded with the weights.
    preprocessing: {teacher.preprocessing}"""


def _speed(num_rows: int) -> str:
    if num_rows >= LEAST_TIMED:
        return """
    # The fastest variant of the network whose answers agree with it, chosen before the first shard and recorded.
    speed: auto"""
    if not _on_cpu():
        return ""
    return """
    # Half the time on a CPU. Refused before the first shard unless the answers agree with the network as it is built.
    speed: {channels_last: true, fold: true}"""


def _forward_pass() -> str:
    if _on_cpu():
        return "16  # images of a forward pass of the teacher: large batches are slower on a CPU"
    return f"{BATCH_SIZE}  # images of a forward pass of the teacher; lower it if memory runs out"


def _on_cpu() -> bool:
    return resolve_device("auto").type == "cpu"


def _decode(folder: Folder, teacher: Source) -> str:
    if folder.longest_side < LARGE * max(teacher.size):
        return ""
    return """
  # Decode large JPEG files at 1/2, 1/4 or 1/8 of their sides, while views have no more pixels: much faster.
  decode: scaled"""


def student_text(folder: Folder, teacher: Source, student: Source, name: str, out: Path) -> str:
    """Return the recipe of the student."""
    rounds = min(8, max(2, round(STEPS * BATCH_SIZE / folder.num_images / NUM_VIEWS)))
    epochs = rounds * NUM_VIEWS
    steps = epochs * -(-folder.num_images // BATCH_SIZE)
    random = {"timm": " (pretrained: false)", "torchvision": " (weights: null)"}.get(str(student.entry["kind"]), "")
    own = student.facts.num_classes == teacher.facts.num_classes
    model = student.entry if own else {**student.entry, "new_head": True}
    head = "" if own else f", but the last layer: {teacher.facts.num_classes} classes, not {student.facts.num_classes}"
    begins = f"Weights that are trained{head}: on few images far better than random ones{random}."
    seen = "As in its training." + " Views of another size are resized for it." * (
        student.facts.preprocessing.size is not None
    )
    rate = "5e-4}  # half the default: pretrained weights need smaller steps"
    if not student.is_trained:
        begins, seen, rate = (
            "Random weights: a few layers, for small images or a first try.",
            "As the teacher's.",
            "2e-3}",
        )
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
#   logitcache train-student {_quoted(out / "student.yaml")}
# Afterwards: logitcache evaluate {shlex.quote(f"runs/{name}")}
out: {dump_inline(f"runs/{name}")}
cache: {dump_inline(f"caches/{name}.zarr")}
# {begins}
model: {dump_inline(model)}
# {seen}
preprocessing: {student.preprocessing}
losses:
  # Temperature 1: higher ones lost accuracy for short runs and small students. Compare with 2 and 4.
  - {{kind: kl_divergence, temperature: 1.0}}
epochs: {epochs}  # the {NUM_VIEWS} views {rounds} times each: {steps:,} steps; the teacher's answers cost nothing more
batch_size: {BATCH_SIZE}
optimizer: {{kind: adamw, lr: {rate}
schedule: {{warmup_epochs: 1}}  # the first steps are the smallest
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


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _workers() -> int:
    return min(MOST_WORKERS, num_cores())


def _square(size: tuple[int, int]) -> str:
    return dump_inline(size[0] if size[0] == size[1] else list(size))
