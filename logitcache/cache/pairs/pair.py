"""`pair`: join a student's images to those of a cache, and record the digests that identify both."""

import json
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from logitcache.cache.cache import Cache, open_cache
from logitcache.cache.pairs.join import By, Join, join_ids, join_pairs, read_pairs
from logitcache.cache.pairs.paired_views import frame_of
from logitcache.cache.pairs.record import NOTE, PairingRecord, numbers_digest, write_pairing
from logitcache.config.recipe import Component, load_recipe
from logitcache.config.trust import remember
from logitcache.errors import DataError, RecipeError
from logitcache.runtime.versions import versions
from logitcache.views import canaries
from logitcache.views.augmentations.base import Size
from logitcache.views.augmentations.base import pair as both_sides
from logitcache.views.datasets import Dataset, open_dataset
from logitcache.views.datasets.base import ImageDataset, fingerprint, warn_of_orientation
from logitcache.views.datasets.custom import Custom
from logitcache.views.keys import Ints, ViewKey
from logitcache.views.paired import UNPAIRED, Color, paired_images
from logitcache.views.spec import Views
from logitcache.views.view_sizes import require_one_size

_LARGEST_DENOMINATOR = 64


class PairOptions(Component):
    """Parsed options of `pair`: the paired images, the size and colours of their views, the teacher's images."""

    dataset: Dataset
    size: Size | None = None
    colors: tuple[Color, ...] = ()
    teacher_dataset: Dataset | None = None


def read_options(
    dataset: str, size: str | None = None, colors: Sequence[str] = (), teacher_dataset: str | None = None
) -> PairOptions:
    """Parse options of the command line: entries of recipes in braces, or folders of images. Raises RecipeError."""
    given = {"dataset": dataset, "teacher_dataset": teacher_dataset}
    changes = [f"{key}={_entry(text)}" for key, text in given.items() if text is not None]
    changes += [f"size={size}"] * (size is not None)
    changes += [f"colors=[{', '.join(colors)}]"] * bool(colors)
    return load_recipe({}, PairOptions, changes)


def _entry(text: str) -> str:
    return text if text.lstrip().startswith("{") else json.dumps({"kind": "image_folder", "root": text})


@dataclass(frozen=True)
class PairResult:
    """Counts of the join; `note` states what a pairing cannot prove."""

    pairing: str
    cache: str
    images: int
    pairs: int
    unmatched: int
    unused: int
    doubled: int
    other_labels: int | None
    image_shape: tuple[int, int, int]
    note: str


def pair(
    cache: str | Path,
    out: str | Path,
    dataset: object,
    *,
    pairs: str | Path | Sequence[tuple[str, str]] | None = None,
    by: By = "id",
    size: Size | None = None,
    colors: Sequence[Color] = (),
    allow_unmatched: bool = False,
    allow_doubled: bool = False,
    teacher_dataset: object | None = None,
    trust: Collection[str] = (),
) -> PairResult:
    """Pair the images of a data set with those of a cache by their ids, or by a CSV file or list of `pairs`.

    Views of the paired images have `size`; by default the size of the teacher's views, times the scale between the
    images if it is the same for all. `teacher_dataset` locates the teacher's images if they have moved. Raises
    DataError for ids without a pair or with several images, MismatchError for images other than those of the cache.
    """
    opened = open_cache(cache)
    teacher = opened.open_images(teacher_dataset, trust)
    opened.require_dataset(teacher)
    images = open_dataset(dataset)
    warn_of_orientation(images)
    listed = read_pairs(Path(pairs)) if isinstance(pairs, str | Path) else pairs
    join = join_ids(teacher.ids, images.ids, by) if listed is None else join_pairs(teacher.ids, images.ids, listed)
    join.require(allow_unmatched=allow_unmatched, allow_doubled=allow_doubled)
    record = _recorded(opened, teacher, images, join, dataset, size, tuple(colors), Path(out))
    remember(record.digest())
    matched = int(np.count_nonzero(join.rows != UNPAIRED))
    counts = {name: getattr(record, name) for name in ("unmatched", "unused", "doubled", "other_labels", "image_shape")}
    return PairResult(str(out), opened.location, len(opened), matched, **counts, note=NOTE)


def _recorded(
    cache: Cache,
    teacher: ImageDataset,
    images: ImageDataset,
    join: Join,
    place: object,
    size: Size | None,
    colors: tuple[Color, ...],
    out: Path,
) -> PairingRecord:
    """Record canaries of the paired images, and write the pairing."""
    manifest = cache.manifest
    sizes = np.asarray(Views(teacher, manifest.views).images.sizes(), np.int64)
    matched = np.flatnonzero(join.rows != UNPAIRED)
    if manifest.views.mixing and len(matched) < len(sizes):
        raise DataError(
            f"{cache.location} mixes each image with another, and {len(sizes) - len(matched)} have no pair. Fix: a "
            "paired image for each, or a cache without views.mixing"
        )
    classes = manifest.fingerprint.num_classes, manifest.class_names
    paired = paired_images(images, join.rows, manifest.first.num_images, cache.labels, *classes)
    channels = images.read(int(join.rows[matched[0]])).shape[0]
    shown = _shown(manifest.image_shape[1:], teacher, paired, matched) if size is None else both_sides(size)
    views = Views(paired, manifest.views, None, frame_of(manifest, sizes, (channels, *shown), colors))
    require_one_size(views)
    chosen = canaries.choose(manifest.views.seed, len(matched), manifest.views.num_views)
    keys = sorted(ViewKey(key.view, int(matched[key.index])) for key in chosen)
    records, pixels = canaries.take(views, keys)
    if tuple(pixels.shape[2:]) != shown:
        raise RecipeError(
            f"no augmentation of {cache.location} gives views a size: those of the paired images are "
            f"{tuple(pixels.shape[2:])}, not {shown}. Fix: leave out --size, or precompute with a crop"
        )
    record = PairingRecord(
        dataset=place if isinstance(place, Component) and not isinstance(place, Custom) else None,  # type: ignore[arg-type]
        fingerprint=fingerprint(images),
        seen=manifest.fingerprint,
        views=manifest.views.digest(),
        image_shape=(channels, *shown),
        colors=colors,
        unmatched=len(sizes) - len(matched),
        unused=len(join.unused),
        doubled=len(join.doubled),
        other_labels=_other_labels(teacher, images, join.rows),
        rows=numbers_digest(join.rows),
        sizes=numbers_digest(sizes),
        canaries=records,
        versions=dict(versions()),
    )
    write_pairing(out, record, join.rows, sizes, pixels)
    return record


def _shown(seen: tuple[int, int], teacher: ImageDataset, paired: ImageDataset, matched: Ints) -> tuple[int, int]:
    """Return the (height, width) of paired views: the teacher's, scaled as the images if each side has one factor."""
    sizes, others = (np.asarray(images.sizes(), np.int64)[matched] for images in (teacher, paired))
    factors = [_factor(sizes[:, side], others[:, side]) for side in range(2)]
    found = [round(length * (factor or 1)) for length, factor in zip(seen, factors, strict=True)]
    return (max(1, found[0]), max(1, found[1])) if None not in factors else seen


def _factor(lengths: Ints, others: Ints) -> Fraction | None:
    """Return the common ratio of others to lengths [n], each within a pixel; None if no ratio fits all.

    The exact ratio if there is one, else the fraction with the smallest denominator.
    """
    exact = Fraction(int(others[0]), int(lengths[0]))
    if (lengths * exact.numerator == others * exact.denominator).all():
        return exact
    low, high = ((others - 1) / lengths).max(), ((others + 1) / lengths).min()
    for denominator in range(1, _LARGEST_DENOMINATOR + 1):
        numerator = int(np.ceil(low * denominator))
        if low < high and 0 < numerator <= high * denominator:
            return Fraction(numerator, denominator)
    return None


def _other_labels(teacher: ImageDataset, images: ImageDataset, rows: Ints) -> int | None:
    """Count the pairs whose images have different labels; None if the two data sets have other classes.

    Warns of a count above 0: labels are the only content that both images of a pair may share.
    """
    alike = teacher.num_classes == images.num_classes and (
        None in (teacher.class_names, images.class_names) or teacher.class_names == images.class_names
    )
    if teacher.num_classes is None or not alike or teacher.labels.ndim != images.labels.ndim:
        return None
    matched = np.flatnonzero(rows != UNPAIRED)
    own, other = teacher.labels[matched], images.labels[rows[matched]]
    differ = ((own != other) & (own >= 0) & (other >= 0)).reshape(len(matched), -1).any(axis=1)
    count = int(np.count_nonzero(differ))
    if count:
        first = int(matched[differ.argmax()])
        warnings.warn(
            f"{count} of {len(matched)} pairs have two labels, such as '{teacher.ids[first]}' and "
            f"'{images.ids[int(rows[first])]}'; students learn from the cache's. Fix: other pairs, if these are wrong",
            stacklevel=3,
        )
    return count
