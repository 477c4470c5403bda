"""`synthesize`: write images that a teacher alone gives rise to, batch after batch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from torch import nn

from logitcache.errors import RecipeError
from logitcache.models import weights_digest
from logitcache.runtime.console import track
from logitcache.runtime.stopping import stop_flag
from logitcache.stage_one.claims import parse_part
from logitcache.stage_one.materialize.view_files import image_bytes, tar_bytes
from logitcache.stage_one.output_folder import Document, OutputFolder
from logitcache.stage_one.synthesize.batches import IMAGES_OF_A_CLASS, SynthesizedBatch, Synthesizer, seconds_of_step
from logitcache.stage_one.synthesize.networks import open_networks
from logitcache.stage_one.synthesize.records import (
    Round,
    batch_record_name,
    is_whole,
    read_record,
    read_rounds,
    write_batch,
)
from logitcache.stage_one.synthesize.synthesize_recipe import SynthesizeRecipe

DESCRIPTION = "synthesis.json"
"""From what and how the images of a folder are made, written before the first of them."""


@dataclass(frozen=True)
class SynthesizeResult:
    """What was written in this run, and what the folder holds of its round; measures are means over the batches there.

    `student_agreement` is that of an adaptive round: the share of images on which student and teacher agree.
    `predicted_seconds` are those of the batches that a dry run would write.
    """

    images: str
    round: int
    batches: int
    batches_written: int
    batches_left: int
    num_images: int
    teacher_accuracy: float | None
    student_agreement: float | None
    losses: Mapping[str, float]
    predicted_seconds: float | None


def synthesize(
    recipe: SynthesizeRecipe,
    out: str | Path,
    *,
    teacher: nn.Module | None = None,
    student: str | Path | nn.Module | None = None,
    part: str | None = None,
    dry_run: bool = False,
) -> SynthesizeResult:
    """Synthesize batches of images into a folder or a URL, `out`; complete batches are kept.

    `teacher` replaces the recipe's model. With a `student`, a run or a module, an adaptive round adds images on which
    it and the teacher disagree. `part` "i/n" makes only every n-th batch; `dry_run` writes nothing, and predicts the
    time from two steps. Raises RecipeError for a teacher without BatchNorm and for classes that would get no image,
    MismatchError if `out` holds images of another teacher or other settings, Stopped after SIGTERM or Ctrl-C; a batch
    that is not finished is made again.
    """
    number, count = parse_part(part)
    if student is not None and not recipe.losses.competition:
        raise RecipeError("losses.competition is 0, by which a student counts. Fix: raise it, or leave out the student")
    synthesizer = open_networks(recipe, teacher, student)
    folder = OutputFolder(out, DESCRIPTION)
    round_, described = _described(folder, synthesizer)
    if not dry_run:
        with folder.alone():  # another round may have begun meanwhile, and would have the same number
            round_, described = _described(folder, synthesizer)
            folder.describe(described, _grows, "images")
    mine = range(recipe.num_batches)[number - 1 :: count]
    todo = [batch for batch in mine if not is_whole(folder, batch_record_name(round_, batch))]
    if dry_run:
        return _result(folder, recipe, round_, 0, seconds_of_step(synthesizer) * recipe.steps * len(todo))
    with stop_flag() as stop:
        steps = track(iter(range(len(todo) * recipe.steps)), "synthesize", len(todo) * recipe.steps, "steps")
        for batch in todo:

            def before_step(batch: int = batch) -> None:
                next(steps)
                if stop:
                    raise stop.stopped(f"stopped: batch {batch} and later ones of {out} are not written; run it again")

            made = synthesizer.batch(round_, batch, before_step)
            files = dict(_files(recipe, f"{round_:02}-{batch:05}", made))
            write_batch(folder, batch_record_name(round_, batch), files, made)
    return _result(folder, recipe, round_, len(todo), None)


def _described(folder: OutputFolder, synthesizer: Synthesizer) -> tuple[int, Document]:
    """Return the number of the round, one for each student and 0 without one, and what the folder is to hold."""
    recipe, student = synthesizer.recipe, synthesizer.student
    own = Round(student=None if student is None else weights_digest(student.module), num_batches=recipe.num_batches)
    rounds = read_rounds(folder)
    number = next((place for place, one in enumerate(rounds) if one.student == own.student), len(rounds))
    if number == 0:
        _require_every_class(recipe, synthesizer.num_classes)
    rounds[number : number + 1] = [own]
    settings = recipe.model_dump(mode="json", exclude={"teacher", "num_batches", "device"})
    return number, {
        "teacher": weights_digest(synthesizer.teacher.module),
        "preprocessing": synthesizer.teacher.preprocessing.model_dump(mode="json"),
        "classes": None if synthesizer.teacher.classes is None else list(synthesizer.teacher.classes),
        "num_classes": synthesizer.num_classes,
        "image_shape": list(synthesizer.image_shape),
        "settings": settings,
        "rounds": [one.model_dump() for one in rounds],
    }


def _require_every_class(recipe: SynthesizeRecipe, num_classes: int) -> None:
    """Raise RecipeError if a class would have no folder: folders are numbered as labels."""
    made, needed = recipe.num_batches * recipe.batch_size, IMAGES_OF_A_CLASS * (num_classes - 1) + 1
    if recipe.format == "image_folder" and made < needed:
        raise RecipeError(
            f"{made} images leave some of {num_classes} classes without any, and class folders would be other labels. "
            f"Fix: num_batches: {-(-needed // recipe.batch_size)}, or format: webdataset"
        )


def _grows(old: Document, new: Document) -> bool:
    """Whether a description adds batches or a round to another."""
    grown = zip(old["rounds"], new["rounds"], strict=False)
    return old | {"rounds": new["rounds"]} == new and all(
        before["num_batches"] <= after["num_batches"] for before, after in grown
    )


def _files(recipe: SynthesizeRecipe, name: str, made: SynthesizedBatch) -> Iterator[tuple[str, bytes]]:
    """Yield the files of a batch: an archive, or an image each in the folder of its class."""
    rows = zip((image_bytes(one, "png") for one in made.pixels), made.labels.tolist(), strict=True)
    if recipe.format == "image_folder":
        # Their order by name is that of the labels.
        yield from ((f"images/{label:06}/{name}-{row:05}.png", png) for row, (png, label) in enumerate(rows))
    else:
        members = (
            (f"{name}-{row:05}.{ending}", content)
            for row, (png, label) in enumerate(rows)
            for ending, content in (("png", png), ("cls", str(label).encode()))
        )
        yield f"shards/{name}.tar", tar_bytes(members)


def _result(
    folder: OutputFolder, recipe: SynthesizeRecipe, round_: int, written: int, seconds: float | None
) -> SynthesizeResult:
    """Read what the batches of a round recorded, those of other processes too."""
    names = [batch_record_name(round_, batch) for batch in range(recipe.num_batches)]
    records = [read_record(folder, name) for name in names if folder.holds(name)]
    agreed = [one.student_agreement for one in records if one.student_agreement is not None]
    return SynthesizeResult(
        f"{folder}/{'images' if recipe.format == 'image_folder' else 'shards'}",
        round_,
        len(names),
        written,
        len(names) - len(records),
        len(records) * recipe.batch_size,
        fmean(one.teacher_accuracy for one in records) if records else None,
        fmean(agreed) if agreed else None,
        {name: fmean(one.losses[name] for one in records) for name in (records[0].losses if records else ())},
        seconds,
    )
