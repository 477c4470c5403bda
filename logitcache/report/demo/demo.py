"""The demo: few labels, many unlabelled images, one cached teacher, in about a minute on two cores."""

import json
import re
import shlex
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from logitcache.cache.cache import open_cache
from logitcache.config.recipe import load_recipe
from logitcache.config.shipped_recipes import NEW_RECIPES
from logitcache.models import Bundled as BundledTeacher
from logitcache.models import Classifier, resolve_preprocessing
from logitcache.report.demo.picture import demo_picture
from logitcache.runtime.console import logger, silenced
from logitcache.stage_one.precompute import PrecomputeRecipe, PrecomputeResult, precompute
from logitcache.store.files import write_atomically
from logitcache.student.evaluation.validation import Validator
from logitcache.student.training import train
from logitcache.student.training_recipes import StudentRecipe, TeacherRecipe
from logitcache.views.datasets.bundled import Bundled
from logitcache.views.spec import Views, ViewSpec

NUM_IMAGES = 5000
NUM_LABELS = 500
NUM_VIEWS = 4
EPOCHS = 14
BATCH_SIZE = 100
SEEDS = 3
TEMPERATURES = (1.0, 4.0)

TRAIN = {"kind": "bundled", "split": "train"}
FEW = {**TRAIN, "num_images": NUM_LABELS}
TEST = {"kind": "bundled", "split": "test"}
AUGMENTATIONS = [{"kind": "random_crop", "size": 28, "padding": 2}, {"kind": "horizontal_flip"}]
STUDENT = {
    "model": {"kind": "small_cnn", "width": 8},
    "batch_size": BATCH_SIZE,
    "optimizer": {"kind": "adamw", "lr": 1.5e-2},
    "channels_last": True,
    "fused": False,
    "schedule": {"warmup_epochs": 0.5},
    "num_workers": 0,
}


_Run = tuple[str, type[StudentRecipe | TeacherRecipe], dict[str, Any], int]
"""Name, kind of recipe, entries, and number of seeds."""


@dataclass(frozen=True)
class DemoTeacher:
    """The teacher, measured on the test images."""

    name: str
    num_parameters: int
    top1: float


@dataclass(frozen=True)
class DemoStudent:
    """One way to train the student, over several seeds."""

    name: str
    from_cache: bool
    top1_mean: float
    top1_std: float
    seeds: int
    teacher_passes: int
    seconds: float


@dataclass(frozen=True)
class DemoResult:
    """The demo's figures; `passes_saved`: teacher passes of online training beyond those that filled the cache.

    `next` is the first command for a folder of one's own.
    """

    teacher: DemoTeacher
    cache: PrecomputeResult
    students: tuple[DemoStudent, ...]
    passes_saved: int
    seconds: float
    report: str
    picture: str
    next: str


def run_demo(directory: Path, quick: bool = False) -> DemoResult:
    """Run teacher, cache and students on the bundled images; write everything into `directory`.

    A stopped demo continues; a finished one only reads its results.
    """
    started = time.perf_counter()
    epochs, seeds = (1, 1) if quick else (EPOCHS, SEEDS)
    teacher = _measure_teacher()
    logger.info(f"teacher: {100 * teacher.top1:.2f} % of the test images, {teacher.num_parameters:,} parameters")
    stage_one = {
        "cache": str(directory / "cache.zarr"),
        "dataset": TRAIN,
        "views": {"num_views": NUM_VIEWS, "augmentations": AUGMENTATIONS},
        "teachers": {"teacher": {"model": {"kind": "bundled"}}},
        "num_workers": 0,
    }
    cache = precompute(load_recipe(stage_one, PrecomputeRecipe))
    written = f"{cache.row_views:,} row-views in {cache.seconds:.1f} s, {cache.bytes / 1e6:.1f} MB"
    logger.info(f"cache: {written}; the teacher is done")
    labels = {"augmentations": AUGMENTATIONS}
    few = {**labels, "dataset": FEW, "epochs": epochs * NUM_IMAGES // NUM_LABELS}
    every = {**labels, "dataset": TRAIN, "epochs": epochs}
    cached: list[_Run] = [
        (
            f"{NUM_IMAGES} unlabelled images, cached teacher, T = {temperature:g}",
            StudentRecipe,
            {
                "cache": stage_one["cache"],
                "losses": [{"kind": "kl_divergence", "temperature": temperature}],
                "epochs": epochs,
            },
            count,
        )
        for temperature, count in zip(TEMPERATURES, (seeds, 1), strict=True)
    ]
    runs: list[_Run] = [
        (f"{NUM_LABELS} labels", TeacherRecipe, few, seeds),
        *cached,
        (f"{NUM_IMAGES} labels", TeacherRecipe, every, 1),
    ]
    result = DemoResult(
        teacher=teacher,
        cache=cache,
        students=tuple(_train(directory, *run) for run in runs),
        passes_saved=sum(count for *_, count in cached) * epochs * NUM_IMAGES - NUM_VIEWS * NUM_IMAGES,
        seconds=round(time.perf_counter() - started, 1),
        report=str(directory / "demo.json"),
        picture=str(directory / "demo.svg"),
        next=shlex.join(["logitcache", *NEW_RECIPES]),
    )
    write_atomically(directory / "demo.svg", demo_picture(result, open_cache(cache.cache)).encode())
    write_atomically(directory / "demo.json", json.dumps(asdict(result), indent=2).encode())
    return result


def _measure_teacher() -> DemoTeacher:
    built = BundledTeacher().build(None, 1)
    classifier = Classifier(built.module, resolve_preprocessing(built, None, who="the bundled teacher"))
    validator = Validator(Views(load_recipe(TEST, Bundled).open(), ViewSpec()), None, 512, 0)
    top1 = validator.tally(classifier, torch.device("cpu")).measures().quality
    assert top1 is not None
    return DemoTeacher("bundled", sum(p.numel() for p in classifier.parameters()), top1)


def _train(
    directory: Path, name: str, recipe: type[StudentRecipe | TeacherRecipe], entries: dict[str, Any], seeds: int
) -> DemoStudent:
    """Train one student a seed, for the same number of steps, and measure each once, at the end."""
    folder = directory / "students" / re.sub(r"[^a-z0-9]+", "_", name.lower())
    entries = {**STUDENT, **entries, "validation": {"dataset": TEST, "every": entries["epochs"]}}
    with silenced():
        results = [
            train(load_recipe({**entries, "out": str(folder / str(seed)), "seed": seed}, recipe), resume=True)
            for seed in range(seeds)
        ]
    top1 = [result.top1 for result in results if result.top1 is not None]
    student = DemoStudent(
        name=name,
        from_cache=recipe is StudentRecipe,
        top1_mean=statistics.mean(top1),
        top1_std=statistics.stdev(top1) if seeds > 1 else 0.0,
        seeds=seeds,
        teacher_passes=sum(result.teacher_passes for result in results),
        seconds=sum(result.seconds for result in results),
    )
    logger.info(
        f"{name}: {100 * student.top1_mean:.1f} ± {100 * student.top1_std:.1f} %, n = {seeds}, {student.seconds:.0f} s"
    )
    return student
