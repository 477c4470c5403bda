"""Files of answers: keys of views, checksums of their pixels, logits, log-probabilities of top-k, and features.

NPZ and parquet hold columns, JSON lines an object for each view:

key                  `VIEW/IMAGE`, both counted from 0
crc32                CRC-32 of the view's pixels, uint8 in the order [C, H, W]; in all rows or in none
logits               a number for each class
classes, log_probabilities   the k most probable classes, and the logarithms of their probabilities
id                   not read: the key names the image
any other name       a feature: a vector, or a map [C, H, W]
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from logitcache.errors import DataError, MissingExtraError, RecipeError, needs_extra
from logitcache.store.remote.client import is_remote
from logitcache.store.safe_files import open_regular

ENDINGS = (".npz", ".parquet", ".jsonl")
KEY, CRC32, LOGITS, CLASSES, LOG_PROBABILITIES = "key", "crc32", "logits", "classes", "log_probabilities"
_NO_VALUES = (KEY, "id", CRC32, CLASSES, LOG_PROBABILITIES)
_VIEW = 40
"""Bits of the number of an image in the code of a key."""
_LEAST = 1e-7
"""The least probability of all classes beside the k most probable ones: their sum is rounded."""
_MOST = 1e-3
"""By how much the k probabilities may add up to more than one."""


class Answers(NamedTuple):
    """Rows of a file: codes of keys [n], checksums [n] if it has any, and float32 [n, ...] by name."""

    codes: NDArray[np.int64]
    crc32: NDArray[np.uint32] | None
    values: Mapping[str, NDArray[np.float32]]


def code_of(view: int, image: int) -> int:
    """Return the number that stands for a key."""
    return view << _VIEW | image


def key_text(code: int) -> str:
    """Return the key that a number stands for, as `3/17`."""
    return f"{code >> _VIEW}/{code & ((1 << _VIEW) - 1)}"


def files_of(location: str) -> list[Path]:
    """List a file of answers, or those in a folder by name. Raises RecipeError if there are none."""
    if is_remote(location):
        raise RecipeError(f"answers at a URL are not read: '{location}'. Fix: copy them to a folder of this machine")
    path = Path(location).expanduser()
    found = sorted(p for p in path.iterdir() if p.suffix in ENDINGS) if path.is_dir() else [path]
    if not found or not all(file.is_file() and file.suffix in ENDINGS for file in found):
        wanted = f"a file, or a folder of files, of {', '.join(ENDINGS)}"
        hint = "" if path.exists() else "; it does not exist: `materialize` writes the views that are to be answered"
        raise RecipeError(f"'{path}' holds no answers. Fix: {wanted}{hint}")
    return found


def read_answers(file: Path, num_classes: int | None) -> Answers:
    """Read a file; `num_classes` is that of top-k answers. Raises DataError naming what is wrong with it."""
    try:
        columns = _READERS[file.suffix](file)
        return _checked(columns, num_classes)
    except (MissingExtraError, RecipeError):
        raise
    except Exception as error:  # damage can surface as anything in a reader
        reason = str(error) or type(error).__name__
        raise DataError(
            f"answers in '{file}' cannot be used: {reason}.\n"
            f"  Fix: write it again: {KEY}, {CRC32}, and {LOGITS}, or {CLASSES} and {LOG_PROBABILITIES}, or features"
        ) from error


def _npz(file: Path) -> dict[str, NDArray[Any]]:
    with open_regular(file) as stream, np.load(stream, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _parquet(file: Path) -> dict[str, NDArray[Any]]:
    with needs_extra("answers in parquet", "hf"):
        from pyarrow import parquet
    with open_regular(file) as stream:
        table = parquet.read_table(stream)
    return {name: _stacked(name, table.column(name).to_pylist()) for name in table.column_names}


def _jsonl(file: Path) -> dict[str, NDArray[Any]]:
    with open_regular(file) as stream:
        rows = [_object(number, line) for number, line in enumerate(stream, 1) if line.strip()]
    names = rows[0].keys() if rows else ()
    for number, row in enumerate(rows, 1):
        if row.keys() != names:
            raise ValueError(f"row {number} has {sorted(row)}, the first {sorted(names)}")
    return {name: _stacked(name, [row[name] for row in rows]) for name in names}


def _object(number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number} is not JSON, as after a stop in the middle of it ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"line {number} is not an object, as {{{KEY!r}: '0/0', …}}")
    return row


def _stacked(name: str, rows: list[Any]) -> NDArray[Any]:
    """Return rows as one array. Raises ValueError if their shapes differ."""
    try:
        return np.array(rows)
    except ValueError as error:
        raise ValueError(f"rows of {name} have different lengths") from error


_READERS = {".npz": _npz, ".parquet": _parquet, ".jsonl": _jsonl}


def _checked(columns: Mapping[str, NDArray[Any]], num_classes: int | None) -> Answers:
    """Check the columns and bring them into one form. Raises ValueError."""
    if KEY not in columns or not len(columns[KEY]):
        raise ValueError(f"it has no column {KEY!r}, or no row (it has {', '.join(sorted(columns)) or 'none'})")
    codes = np.array([_code(str(key)) for key in columns[KEY].tolist()], np.int64)
    values = {name: column for name, column in columns.items() if name not in _NO_VALUES}
    if pair := [name for name in (CLASSES, LOG_PROBABILITIES) if name in columns]:
        if LOGITS in columns:
            raise ValueError(f"it has both {LOGITS} and {pair[0]}")
        if len(pair) < 2:
            raise ValueError(f"it has {pair[0]} alone: {CLASSES} and {LOG_PROBABILITIES} belong together")
        values[LOGITS] = _logits_of_top_k(columns[CLASSES], columns[LOG_PROBABILITIES], num_classes)
    if not values:
        raise ValueError(f"it has no answers: {LOGITS}, {CLASSES} and {LOG_PROBABILITIES}, or features")
    for name, column in values.items():
        if column.dtype.kind not in "fiu" or column.ndim < 2 or len(column) != len(codes):
            raise ValueError(
                f"{name} is {column.dtype} {list(column.shape)}: {len(codes)} rows of numbers, of one shape"
            )
    crc32 = columns.get(CRC32)
    if crc32 is not None and (crc32.dtype.kind not in "iu" or crc32.shape != codes.shape):
        raise ValueError(f"{CRC32} is {crc32.dtype} {list(crc32.shape)}: a whole number for each row")
    exact = None if crc32 is None else crc32.astype(np.uint32)
    return Answers(codes, exact, {name: np.asarray(column, np.float32) for name, column in values.items()})


def _code(key: str) -> int:
    view, slash, image = key.partition("/")
    if not (slash and view.isdecimal() and image.isdecimal() and int(image) < 1 << _VIEW and int(view) < 1 << 22):
        raise ValueError(f"the key {key!r} is not VIEW/IMAGE, as 3/17 is")
    return code_of(int(view), int(image))


def _logits_of_top_k(
    classes: NDArray[Any], log_probabilities: NDArray[Any], num_classes: int | None
) -> NDArray[np.float32]:
    """Return logits [n, K] whose softmax has these probabilities; what is left of one is shared by the other classes.

    Raises ValueError for classes and probabilities that are none.
    """
    if num_classes is None:
        raise ValueError(
            f"it has {CLASSES} and {LOG_PROBABILITIES}: the model's num_classes (--num-classes) states of how many"
        )
    classes, log_p = np.asarray(classes), np.asarray(log_probabilities, np.float64)
    if classes.dtype.kind not in "iu" or classes.ndim != 2 or classes.shape != log_p.shape:
        raise ValueError(f"{CLASSES} {list(classes.shape)} and {LOG_PROBABILITIES} {list(log_p.shape)}: [n, k] each")
    if classes.min() < 0 or classes.max() >= num_classes or (np.diff(np.sort(classes, axis=1), axis=1) == 0).any():
        raise ValueError(f"{CLASSES} of a row are different numbers from 0 to {num_classes - 1}")
    if not np.isfinite(log_p).all():
        row = int(np.flatnonzero(~np.isfinite(log_p).all(axis=1))[0])
        raise ValueError(f"{LOG_PROBABILITIES} of row {row} are not finite: clip probabilities at {_LEAST:g} first")
    total = np.exp(log_p).sum(axis=1)
    if (total > 1 + _MOST).any():
        row = int(np.argmax(total))
        raise ValueError(f"probabilities of row {row} add up to {total[row]:.4g}: give their natural logarithms")
    others = max(1, num_classes - classes.shape[1])
    rest = np.log(np.maximum(1 - total, _LEAST) / others)
    logits = np.repeat(rest[:, None], num_classes, axis=1)
    np.put_along_axis(logits, classes, log_p, axis=1)
    return logits.astype(np.float32)
