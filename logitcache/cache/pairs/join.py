"""The join: which image of one data set belongs to which of another, by their ids or by a list of pairs."""

import csv
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from logitcache.errors import DataError, RecipeError
from logitcache.store.safe_files import open_regular
from logitcache.views.keys import Ints
from logitcache.views.paired import UNPAIRED

By = Literal["id", "stem"]
"""What pairs share: the whole id, or the id without the ending of a file's name."""

_SHOWN = 3
_COLUMNS = ("teacher", "student")


class Join(NamedTuple):
    """The place [N] of the image that is paired with each one of the teacher's, UNPAIRED for none, and what is left.

    `unmatched` are ids of the teacher's without a paired image, or of a list and of neither side; `unused` those of the
    student's that are paired with none; `doubled` those that stand for several.
    """

    rows: Ints
    unmatched: Sequence[str]
    unused: Sequence[str]
    doubled: Sequence[str]

    def require(self, *, allow_unmatched: bool, allow_doubled: bool) -> None:
        """Raise DataError for ids that are left on either side, or that stand for several, unless these are allowed."""
        if (self.rows == UNPAIRED).all():
            raise DataError(
                f"no id is on both sides: the teacher's are {_shown(self.unmatched)}, the student's "
                f"{_shown(self.unused)}. Fix: --by stem, if they differ in the ending alone, or --map FILE, with the "
                "columns teacher,student"
            )
        left = {"of the teacher's have no pair": self.unmatched, "of the student's have none": self.unused}
        if any(left.values()) and not allow_unmatched:
            texts = [f"{len(ids)} ids {which}: {_shown(ids)}" for which, ids in left.items() if ids]
            raise DataError(
                f"{'; '.join(texts)}. Fix: complete the images, or --allow-unmatched, which leaves them out"
            )
        if self.doubled and not allow_doubled:
            raise DataError(
                f"{len(self.doubled)} ids stand for several images: {_shown(self.doubled)}. Fix: make them unique, or "
                "--allow-doubled, which takes the first"
            )


def join_ids(teacher: Sequence[str], student: Sequence[str], by: By = "id") -> Join:
    """Pair the images of equal ids, or stems."""
    key: Callable[[str], str] = _stem if by == "stem" else str
    places, doubled = _first_places(map(key, student))
    rows = np.array([places.get(key(one), UNPAIRED) for one in teacher], np.int64)
    of_teacher = Counter(map(key, teacher)) if by == "stem" else Counter[str]()
    doubled += [one for one, count in of_teacher.items() if count > 1]
    unmatched = [teacher[row] for row in np.flatnonzero(rows == UNPAIRED).tolist()]
    known = set(map(key, teacher))
    return Join(rows, unmatched, [one for one in student if key(one) not in known], doubled)


def join_pairs(teacher: Sequence[str], student: Sequence[str], pairs: Sequence[tuple[str, str]]) -> Join:
    """Pair images by a list of (teacher's id, student's id)."""
    first: dict[str, str] = {}
    for own, other in pairs:
        first.setdefault(own, other)
    doubled = [one for side in zip(*pairs, strict=True) for one, count in Counter(side).items() if count > 1]
    places, _ = _first_places(student)
    rows = np.array([places.get(first.get(one, ""), UNPAIRED) for one in teacher], np.int64)
    known = set(teacher)
    unmatched = [teacher[row] for row in np.flatnonzero(rows == UNPAIRED).tolist()]
    unmatched += [own for own in first if own not in known]
    listed = {other for _, other in pairs}
    return Join(rows, unmatched, [one for one in student if one not in listed], doubled)


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """Read a CSV file with the columns teacher and student. Raises RecipeError."""
    try:
        with open_regular(path) as file:
            text = file.read().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"--map {path} cannot be read: {error}. Fix: a CSV file in UTF-8") from error
    reader = csv.DictReader(text.splitlines())
    if missing := [column for column in _COLUMNS if column not in (reader.fieldnames or ())]:
        raise RecipeError(
            f"--map {path} has no column {missing}. Fix: a first line `teacher,student`, then a pair a line"
        )
    pairs = [(row["teacher"] or "", row["student"] or "") for row in reader]
    if empty := [number for number, pair in enumerate(pairs, 2) if not all(pair)]:
        raise RecipeError(f"--map {path}:{empty[0]} lacks an id. Fix: two ids a line")
    if not pairs:
        raise RecipeError(f"--map {path} lists no pair. Fix: two ids a line")
    return pairs


def _first_places(names: Iterable[str]) -> tuple[dict[str, int], list[str]]:
    """Return the first place of each name, and the names that have several."""
    places: dict[str, int] = {}
    doubled: dict[str, None] = {}
    for place, name in enumerate(names):
        if places.setdefault(name, place) != place:
            doubled[name] = None
    return places, list(doubled)


def _stem(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    return folder + slash + (file.rpartition(".")[0] or file)


def _shown(ids: Sequence[str]) -> str:
    return ", ".join(map(repr, ids[:_SHOWN])) + (", …" if len(ids) > _SHOWN else "")
