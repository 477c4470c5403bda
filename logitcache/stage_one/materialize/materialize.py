"""Materialize: write every view that a teacher is to answer, so that one of another framework can."""

import contextlib
import hashlib
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from logitcache.cache.cache import open_cache
from logitcache.cache.format.root import ROOT
from logitcache.errors import RecipeError
from logitcache.runtime.console import track
from logitcache.runtime.stopping import stop_flag
from logitcache.stage_one.claims import parse_part
from logitcache.stage_one.inputs import open_views
from logitcache.stage_one.materialize.view_files import (
    ENDINGS,
    FileForm,
    PixelForm,
    RenderedViews,
    encode_views,
    image_sizes,
    predicted_bytes,
)
from logitcache.stage_one.output_folder import Document, OutputFolder
from logitcache.store.remote.client import is_remote
from logitcache.teacher.precompute_recipe import PrecomputeRecipe
from logitcache.views import canaries
from logitcache.views.checksums import row_checksums
from logitcache.views.datasets.base import fingerprint
from logitcache.views.keys import ViewKey
from logitcache.views.loader import StartMethod, ViewLoader
from logitcache.views.spec import Views
from logitcache.views.view_sizes import require_one_size

DESCRIPTION = "views.json"
"""What the files of a folder hold, written before the first of them."""
FILE_BYTES = 64 << 20
"""Bytes of pixels of a file, unless one view has more."""
_BATCH = 64


@dataclass(frozen=True)
class MaterializeResult:
    """What was written: `files_left` are those of other parts that are not there yet; bytes are of this run's files."""

    out: str
    files: int
    files_written: int
    files_left: int
    views: int
    bytes: int
    predicted_bytes: int


@dataclass(frozen=True)
class ViewFile:
    """A file of views of consecutive images."""

    view: int
    start: int
    stop: int

    def name(self, form: FileForm) -> str:
        """Return its name, by which files are in the order of their views."""
        return f"{self.view:04}-{self.start:09}.{ENDINGS[form]}"

    @property
    def keys(self) -> list[ViewKey]:
        """The keys of its views."""
        return [ViewKey(self.view, index) for index in range(self.start, self.stop)]


def view_files_of(num_views: int, num_images: int, shape: Sequence[int]) -> list[ViewFile]:
    """Divide all views, of pixels [C, H, W], among files."""
    rows = min(num_images, max(1, FILE_BYTES // math.prod(shape)))
    return [
        ViewFile(view, start, min(start + rows, num_images))
        for view in range(num_views)
        for start in range(0, num_images, rows)
    ]


def bytes_of(views: Views, form: FileForm = "webdataset", pixels: PixelForm = "png") -> int:
    """Predict the bytes of all files; those of PNG from up to 32 views, which are rendered."""
    num_images, num_views = len(views.dataset.ids), views.spec.num_views
    is_raw = pixels == "raw" or form == "npz"
    tried = [ViewKey(0, 0)] if is_raw else canaries.choose(views.spec.seed, num_images, num_views)
    rendered = views.__getitems__(tried).numpy()
    sizes = image_sizes(rendered, "raw" if is_raw else "png")
    counts = [file.stop - file.start for file in view_files_of(num_views, num_images, rendered.shape[1:])]
    return predicted_bytes(sizes, counts, views.dataset.ids, num_views, form)


def materialize(
    source: str | Path | PrecomputeRecipe,
    out: str | Path,
    *,
    form: FileForm = "webdataset",
    pixels: PixelForm = "png",
    part: str | None = None,
    dry_run: bool = False,
    num_workers: int = 0,
    dataset: object | None = None,
    factories: Sequence[str] = (),
    trust: Collection[str] = (),
) -> MaterializeResult:
    """Write the views of a recipe, or of the cache at a path, to files below `out`, a folder or a URL.

    Files that are there stay: the same call continues after a stop, and adds the files of further views. `part` "i/n"
    takes each n-th file; `dry_run` writes nothing. `dataset` takes the place of the recipe's or the cache's;
    `factories` and `trust` are those of `Cache.views`. Raises MismatchError if `out` holds other views, Stopped after
    SIGTERM or Ctrl-C.
    """
    number, count = parse_part(part)
    views, start_method = _views_of(source, dataset, factories, trust)
    num_images, shape = len(views.dataset.ids), tuple(views[ViewKey(0, 0)].shape)
    files = view_files_of(views.spec.num_views, num_images, shape)
    predicted = bytes_of(views, form, pixels)
    if dry_run:
        return MaterializeResult(str(out), len(files), 0, len(files), 0, 0, predicted)
    folder = OutputFolder(out, DESCRIPTION)
    folder.describe(_description(views, shape, files[0].stop, form, pixels), _has_more_views, "views")
    mine = [file for place, file in enumerate(files) if place % count == number - 1]
    todo = [file for file in mine if not folder.holds(file.name(form))]
    written = 0
    with stop_flag() as stop, contextlib.closing(ViewLoader(views, num_workers, start_method)) as loader:
        rendered = _rendered(loader, views, todo)
        for file in track(iter(todo), "materialize", len(todo), "files"):
            if stop.wait(0.0):
                raise stop.stopped(f"stopped: {file.name(form)} and later files of {out} are not written; run it again")
            content = encode_views(next(rendered), form, pixels)
            folder.write(file.name(form), content)
            written += len(content)
    left = sum(not folder.holds(file.name(form)) for file in files) if count > 1 else 0
    done = sum(file.stop - file.start for file in todo)
    return MaterializeResult(str(out), len(files), len(todo), left, done, written, predicted)


def _views_of(
    source: str | Path | PrecomputeRecipe, dataset: object | None, factories: Sequence[str], trust: Collection[str]
) -> tuple[Views, StartMethod]:
    """Open the views that a teacher answers, of a recipe or of a cache."""
    if isinstance(source, PrecomputeRecipe):
        views = open_views(source, {}, dataset)[-1]
        require_one_size(views)
        return views.answered(), source.start_method
    if not is_remote(source) and not (Path(source) / ROOT).is_file():
        raise RecipeError(f"'{source}' is neither a recipe nor a cache. Fix: a YAML file, or the folder of a cache")
    return open_cache(source).views(dataset, factories=factories, trust=trust).answered(), "forkserver"


def _rendered(loader: ViewLoader, views: Views, files: Sequence[ViewFile]) -> Iterator[RenderedViews]:
    """Render file after file, reading ahead."""
    batches = [file.keys[start : start + _BATCH] for file in files for start in range(0, len(file.keys), _BATCH)]
    images = loader.render(iter(batches))
    for file in files:
        parts = [next(images) for _ in range(0, len(file.keys), _BATCH)]
        crc32 = np.concatenate([row_checksums(part) for part in parts])
        pixels = np.concatenate([np.ascontiguousarray(part.numpy()) for part in parts])
        yield RenderedViews(pixels, file.keys, list(views.dataset.ids[file.start : file.stop]), crc32)


def _description(views: Views, shape: Sequence[int], rows: int, form: FileForm, pixels: PixelForm) -> Document:
    """Describe what the files hold: the same views, images and form give the same bytes."""
    spec = views.spec.model_copy(update={"num_views": 1}).model_dump_json().encode()
    return {
        "format": form,
        "pixels": pixels if form != "npz" else "raw",
        "shape": list(shape),
        "num_images": len(views.dataset.ids),
        "num_views": views.spec.num_views,
        "views_per_file": rows,
        "views": hashlib.sha256(spec).hexdigest(),
        "images": fingerprint(views.dataset).content,
        "key": "VIEW/IMAGE, both counted from 0",
        "crc32": "of the pixels, uint8 in the order [C, H, W]",
    }


def _has_more_views(old: Document, new: Document) -> bool:
    return bool(old | {"num_views": new["num_views"]} == new and old["num_views"] < new["num_views"])
