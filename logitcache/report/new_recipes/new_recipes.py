"""New recipes for a folder of one's own: a teacher over its images, and a student from the cache."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from logitcache.config.shipped_recipes import write_recipes
from logitcache.report.new_recipes import texts
from logitcache.report.new_recipes.sources import inspect_folder, read_source, read_student, require_folder
from logitcache.runtime.console import logger


@dataclass(frozen=True)
class NewRecipes:
    """The files that were written, in the order of their use, and what they were made for."""

    files: list[str]
    num_images: int
    labelled: bool
    teacher_classes: int
    view_size: tuple[int, int]


def new_recipes(images: str, teacher: str, student: str, out: Path | None = None) -> NewRecipes:
    """Write recipes for the images of a folder; `teacher` and `student` are timm:NAME, torchvision:NAME or run:DIR.

    The files are a precompute recipe, one more for validation images if these have no labels of the teacher's classes,
    and a student recipe; if the folders are classes that the teacher does not predict, also a recipe that trains it on
    them. Raises RecipeError for unknown models and for files that exist, DataError for a folder
    without images.
    """
    require_folder(images)
    taught = read_source("--teacher", teacher)
    learner = read_student(student, taught)
    folder = inspect_folder(images, taught)
    called = images.rstrip("/").rpartition("/")[2] if out is None else out.name
    name = re.sub(r"[^A-Za-z0-9-]+", "_", called).strip("_") or "photos"
    out = Path("pipelines") / name if out is None else out
    again = shlex.join(["recipe", "new", "--images", images, "--teacher", teacher, "--student", student])
    written = {out / "precompute.yaml": texts.precompute_text(folder, taught, name, out, again)}
    if folder.class_names is None:
        logger.info(f"labels are not read: {folder.unlabelled_because or 'the folder has no classes'}")
        written[out / "precompute_validation.yaml"] = texts.precompute_validation_text(folder, taught, name, out)
    written[out / "student.yaml"] = texts.student_text(folder, taught, learner, name, out)
    if folder.has_other_classes:
        written[out / "teacher.yaml"] = texts.teacher_text(folder, taught, name, out, images, student)
        command = shlex.join(["logitcache", "train-teacher", str(out / "teacher.yaml")])
        logger.info(f"to train {taught.name} on these classes first: {command}")
    if 2 * folder.longest_side <= max(taught.size):
        logger.info(
            f"the images have up to {folder.longest_side} pixels a side, and the recipes bring them to "
            f"{max(taught.size)}, as the weights of {taught.name} want. Random weights (model.weights: null, or "
            f"pretrained: false) learn faster at {folder.longest_side}: change size and input_size everywhere"
        )
    if taught.began_random and learner.is_trained:
        logger.info(
            f"{taught.name} began with random weights; {learner.name} begins with pretrained ones, which are "
            f"downloaded. For random ones change model in {out / 'student.yaml'}"
        )
    write_recipes(written)
    files = [str(file) for file in written]
    return NewRecipes(files, folder.num_images, folder.class_names is not None, taught.facts.num_classes, taught.size)
