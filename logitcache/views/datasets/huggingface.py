"""Hugging Face: data sets of `datasets`, of the Hub or in a folder; images are the encoded bytes of a column."""

import functools
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from logitcache.config.recipe import Count
from logitcache.errors import DataError, RecipeError, did_you_mean, needs_extra
from logitcache.runtime.console import track
from logitcache.store import digest_index
from logitcache.store.hub import hub_name, local_folder
from logitcache.store.safe_files import open_regular
from logitcache.views.datasets.base import DatasetBase, digest_of
from logitcache.views.datasets.custom import as_ids
from logitcache.views.datasets.image_folder import LARGEST
from logitcache.views.datasets.images.image_files import HEADERS, Decoder, ImageFiles, Orientation, head_of
from logitcache.views.datasets.images.labels import LabelTable, as_label
from logitcache.views.datasets.images.pixels import Mode
from logitcache.views.datasets.map_style import num_items
from logitcache.views.datasets.scan_memory import Scan, ScanMemory, ScannedImages

_AREA = "datasets/"
_SAVED = ("state.json", "dataset_dict.json")
"""Files of a folder that `save_to_disk` wrote: of one split, and of several."""


class HuggingFace(DatasetBase):
    """A data set of Hugging Face; needs `pip install 'logitcache[hf]'`.

    Rows keep their order. The fingerprint covers the encoded bytes of the images. Folders of Parquet or Arrow files,
    and those of `save_to_disk`, need no network.
    """

    added: ClassVar[frozenset[str]] = frozenset()

    kind: Literal["huggingface"] = "huggingface"
    path: str = Field(
        description="Folder of Parquet or Arrow files or of `save_to_disk`, or `hf://datasets/OWNER/NAME` on the Hub.",
        examples=["datasets/beans", "hf://datasets/uoft-cs/cifar10"],
    )
    name: str | None = Field(
        default=None, description="Configuration, if the data set has several.", examples=["plain_text"]
    )
    split: str | None = Field(
        default=None,
        description="Split, if there are several; a slice as in `train[:10%]` is allowed except for `save_to_disk`.",
        examples=["train"],
    )
    revision: str | None = Field(
        default=None,
        description="Branch, tag or commit of a data set on the Hub; by default its main branch.",
        examples=["main"],
    )
    image: str = Field(default="image", description="Column of the images: encoded files, or paths of files.")
    label: str | None = Field(
        default=None,
        description="Column of the labels: a class or, for multi-label data, a list of 1, 0 and -1 (unknown). By "
        "default images have no labels.",
        examples=["label"],
    )
    id: str | None = Field(
        default=None,
        description="Column of unique names; by default images are named by split and row.",
        examples=["file"],
    )
    num_classes: Count | None = Field(
        default=None, description="Number of classes, if the column of the labels does not state it.", examples=[10]
    )
    mode: Mode = "RGB"
    decoder: Decoder = "pillow"
    orientation: Orientation = "ignore"
    streaming: bool = Field(default=False, description="Always false: rows of a stream cannot be read by number.")

    @field_validator("streaming")
    @classmethod
    def _has_rows(cls, streaming: bool) -> bool:
        if streaming:
            raise ValueError(
                "a stream cannot be replayed: its rows have no number. Leave streaming out: rows are read from files "
                "when they are needed, not into memory; or take a part of the data set by split: train[:10%]"
            )
        return streaming

    def risks(self) -> tuple[str, ...]:
        """Name the folder or the repository: `datasets` reads its files without a bound, and follows paths in them."""
        return (f"the data set '{self.path}' of Hugging Face",)

    def open(self) -> "HuggingFaceImages":
        """Open the rows. Raises RecipeError for a wrong column or split, DataError for rows that cannot be used."""
        opened_ns = digest_index.now_ns()
        rows = self._rows()
        for key in ("image", "label", "id"):
            column = getattr(self, key)
            if column is not None and column not in rows.column_names:
                hint = did_you_mean(column, rows.column_names)
                raise RecipeError(
                    f"'{self.path}' has no column {column!r}.{hint}\n"
                    f"  Fix: dataset.{key}: one of {', '.join(rows.column_names)}"
                )
        files = tuple(entry["filename"] for entry in rows.cache_files)
        return HuggingFaceImages(self, rows, _memory(self, files, opened_ns))

    def _rows(self) -> Any:
        """Open the split with `datasets`."""
        with needs_extra("a data set of kind huggingface", "hf"):
            import datasets
        hub = hub_name(self.path, _AREA)
        folder = local_folder(self.path, self.revision, _AREA) if hub is None else None
        was_shown = datasets.is_progress_bar_enabled()
        datasets.disable_progress_bar()
        try:
            if folder is not None and any((folder / name).is_file() for name in _SAVED):
                if self.name is not None:
                    raise RecipeError(f"'{self.path}' is of save_to_disk, without names. Fix: leave `name` out")
                return self._split_of(datasets.load_from_disk(str(folder)))
            revision = {} if hub is None else {"revision": self.revision}
            found = datasets.load_dataset(hub or str(folder), self.name, split=self.split, **revision)
            return found if self.split is not None else self._split_of(found)
        except RecipeError:
            raise
        except Exception as error:  # builders, parsers and the network raise anything
            reason = str(error).strip() or repr(error)
            fix = "correct path, name and split" if hub is None else "check the network and the name, or give a folder"
            raise DataError(f"'{self.path}' cannot be opened: {reason}.\n  Fix: {fix}") from error
        finally:
            if was_shown:
                datasets.enable_progress_bar()

    def _split_of(self, found: Any) -> Any:
        """Choose the split. Raises RecipeError if there are several, or another one."""
        if not isinstance(found, Mapping):
            own = (self.split or "").partition("[")[0] if found.split is None else str(found.split)
            if self.split not in (None, own, own.partition("[")[0]):
                raise RecipeError(f"'{self.path}' is the split {own!r}, not {self.split!r}. Fix: split: {own}")
            return found
        names = [str(name) for name in found]
        if self.split is None and len(names) == 1:
            return found[names[0]]
        if self.split not in names:
            asked = "no split is named" if self.split is None else f"there is no split {self.split!r}"
            hint = did_you_mean(self.split, names) if self.split else ""
            raise RecipeError(
                f"'{self.path}' has the splits {', '.join(names)}, and {asked}.{hint}\n  Fix: split: {names[0]}"
            )
        return found[self.split]


def _memory(entry: HuggingFace, files: tuple[str, ...], opened_ns: int) -> ScanMemory | None:
    """Return where the scan of the rows is remembered, if they lie in files."""
    if not files:
        return None
    identity = f"{entry.model_dump_json()} {HEADERS}"
    return ScanMemory(Path(files[0]).parent, identity, opened_ns, files)


class HuggingFaceImages(ScannedImages, ImageFiles):
    """The images of rows, in their order."""

    def __init__(self, entry: HuggingFace, rows: Any, memory: ScanMemory | None) -> None:
        name = f"'{entry.path}'"
        count = num_items(rows, name)
        given = None if entry.id is None else [str(value) for value in rows.with_format(None)[entry.id]]
        ids = as_ids(given, count, name, f"{entry.split}/" if entry.split else "")
        self._column, self._images = entry.image, _encoded(rows, entry.image, name)
        self._labels_of: Callable[[int], object] | None = None
        feature = None
        if entry.label is not None:
            labels, feature = rows.with_format(None).select_columns([entry.label]), rows.features[entry.label]
            self._labels_of = functools.partial(_label_at, labels, entry.label)
        ScannedImages.__init__(self, ids, name, _class_names(feature), entry.num_classes, memory)
        ImageFiles.__init__(self, entry.mode, entry.orientation)

    def contents(self, indices: Sequence[int]) -> Iterator[bytes]:
        """Read the encoded bytes of rows; raises DataError naming an image that cannot be read."""
        return map(self._content, indices)

    @property
    def is_scanned(self) -> bool:
        """Whether every row has been read."""
        return "scan" in vars(self)

    def heads(self) -> NDArray[np.int64]:
        """Return the heads of all images [n, 3]."""
        return self.scan.sizes

    def _read_all(self) -> Scan:
        count = len(self.ids)
        labels, heads, digests = LabelTable(count), np.empty((count, 3), np.int64), np.empty(count, np.uint64)
        for index in track(range(count), f"reading {self._name}", count):
            content = self._content(index)
            digests[index] = digest_of(content)
            heads[index] = head_of(io.BytesIO(content), self.shown(index))
            if self._labels_of is not None:
                self._put(labels, index, self._labels_of(index))
        return Scan(labels.values, heads, digests)

    def _put(self, labels: LabelTable, index: int, label: object) -> None:
        try:
            labels.put(index, as_label(label))
        except ValueError as cause:
            raise DataError(
                f"row '{self.ids[index]}' (index {index}) of {self._name} has no usable label: {cause}.\n"
                "  Fix: name another column, or leave `label` out"
            ) from cause

    def _content(self, index: int) -> bytes:
        """Return the encoded bytes of an image. Raises DataError."""
        value = self._images[index][self._column]
        if isinstance(value, Mapping) and value.get("bytes") is None:
            self._memory = None  # it does not know the file in which this image lies
        try:
            content = _bytes_of(value)
        except (OSError, ValueError) as cause:
            reason = (cause.strerror if isinstance(cause, OSError) else None) or cause
            raise DataError(
                f"{self.shown(index)} cannot be read: {reason}.\n  Fix: name the column of the images, or put it back"
            ) from cause
        if len(content) > LARGEST:
            raise DataError(f"{self.shown(index)} has more than {LARGEST} bytes.\n  Fix: replace it or remove it")
        return content

    def shown(self, index: int) -> str:
        """Name an image by its row and column."""
        return f"the image of row '{self.ids[index]}' (index {index}) in column {self._column!r} of {self._name}"


def _encoded(rows: Any, column: str, name: str) -> Any:
    """Return the rows with the images alone, undecoded. Raises RecipeError for a column of something else."""
    from datasets import Image, Value

    feature = rows.features[column]
    plain = isinstance(feature, Value) and feature.dtype in ("binary", "large_binary")
    if not isinstance(feature, Image) and not plain and not (isinstance(feature, dict) and "bytes" in feature):
        raise RecipeError(
            f"column {column!r} of {name} holds {feature}, not images.\n"
            f"  Fix: dataset.image: one of {', '.join(rows.column_names)}; arrays of pixels become images by "
            "cast_column(…, datasets.Image()) and save_to_disk"
        )
    alone = rows.with_format(None).select_columns([column])
    return alone.cast_column(column, Image(decode=False)) if isinstance(feature, Image) else alone


def _bytes_of(value: object) -> bytes:
    """Return the bytes of an undecoded image: its own, or those of the file that it names."""
    if isinstance(value, Mapping):
        path, value = value.get("path"), value.get("bytes")
        if value is None and path:
            with open_regular(path) as file:
                return file.read(LARGEST + 1)
    if not isinstance(value, bytes) or not value:
        raise ValueError("the row has no image")
    return value


def _label_at(rows: Any, column: str, index: int) -> object:
    return rows[index][column]


def _class_names(feature: Any) -> tuple[str, ...] | None:
    """Return the names of the classes of a column, also of a list of classes."""
    names = getattr(feature, "names", None)
    return tuple(map(str, names)) if names else None
