"""What a folder of synthesized images records: its rounds, and of each batch how it came out."""

from collections.abc import Mapping
from hashlib import sha256
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from logitcache.config.mistakes import first_mistake
from logitcache.config.recipe import Component, Count, Fraction
from logitcache.errors import CacheError
from logitcache.runtime.versions import versions
from logitcache.stage_one.output_folder import OutputFolder
from logitcache.stage_one.synthesize.batches import SynthesizedBatch

T = TypeVar("T")


class Round(Component):
    """Batches that were made against one student, named by the digest of its weights, or against none."""

    student: str | None
    num_batches: Count


class BatchRecord(Component):
    """A batch: losses and measures of its images as they were written, and the digests of its files."""

    losses: dict[str, float]
    teacher_accuracy: Fraction
    student_agreement: Fraction | None
    sha256: dict[str, str]
    versions: dict[str, str]


def batch_record_name(round_: int, batch: int) -> str:
    """Return the file of a batch's record."""
    return f"batches/{round_:02}-{batch:05}.json"


def read_rounds(folder: OutputFolder) -> list[Round]:
    """Read the rounds of a folder; none if it is new. Raises CacheError if its description is damaged."""
    return _checked(TypeAdapter(list[Round]), folder.description().get("rounds", []), f"the rounds of {folder}")


def read_record(folder: OutputFolder, name: str) -> BatchRecord:
    """Read the record of a batch. Raises CacheError if it is damaged."""
    return _checked(TypeAdapter(BatchRecord), folder.read_json(name), f"'{folder}/{name}'")


def _checked(kind: TypeAdapter[T], value: object, what: str) -> T:
    try:
        return kind.validate_python(value)
    except ValidationError as error:
        raise CacheError(f"{what} is damaged: {first_mistake(error)}. Fix: remove the file, and run again") from error


def write_batch(folder: OutputFolder, name: str, files: Mapping[str, bytes], made: SynthesizedBatch) -> None:
    """Write the files of a batch, and then its record: without it they do not count, and are written again."""
    for file, content in files.items():
        folder.write(file, content)
    record = BatchRecord(
        losses=dict(made.losses),
        teacher_accuracy=made.teacher_accuracy,
        student_agreement=made.student_agreement,
        sha256={file: sha256(content).hexdigest() for file, content in files.items()},
        versions=versions(),
    )
    folder.write(name, record.model_dump_json(indent=1).encode() + b"\n")


def is_whole(folder: OutputFolder, name: str) -> bool:
    """Whether a batch has its record and, on this machine, the files of which it has the digests.

    At a URL reading them would take a request for each image.
    """
    if not folder.holds(name) or not folder.is_local:
        return folder.holds(name)
    digests = read_record(folder, name).sha256.items()
    return all(folder.holds(file) and sha256(folder.read(file)).hexdigest() == digest for file, digest in digests)
