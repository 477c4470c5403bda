"""Bind the views of a cache to the images that a pairing names, and prove that they are these."""

import warnings
from collections.abc import Collection
from typing import TYPE_CHECKING

from logitcache.cache.format.manifest import Manifest
from logitcache.cache.pairs.record import Pairing
from logitcache.cache.replay import open_images
from logitcache.errors import MismatchError
from logitcache.runtime.versions import versions
from logitcache.views import canaries
from logitcache.views.augmentations.base import Scale
from logitcache.views.datasets.base import ImageDataset, fingerprint
from logitcache.views.datasets.fingerprint_diff import explain_difference
from logitcache.views.keys import Ints
from logitcache.views.paired import Color, Frame, paired_images
from logitcache.views.spec import Recorded, Views

if TYPE_CHECKING:
    from logitcache.cache.cache import Cache


def paired_views(
    cache: "Cache",
    pairing: Pairing,
    dataset: object | None,
    verify: canaries.Level,
    limits: canaries.DriftLimits,
    recorded: Recorded | None,
    trust: Collection[str],
) -> Views:
    """Return views of the paired images by the geometry of a cache's.

    `dataset` is their data set or its component; by default they are looked for where `pair` read them. Raises
    MismatchError for other images, ReplayMismatchError for other pixels, RefusedError for images that are not opened.
    """
    record = pairing.record
    count = record.fingerprint.num_images
    images = open_images(record.dataset, count, str(pairing.store), dataset, record.digest(), trust)
    if fingerprint(images) != record.fingerprint:
        difference = explain_difference(record.fingerprint, None, images)
        raise MismatchError(f"{pairing.store} was made from other images:\n{difference}")
    if verify != "off":
        views = _views(cache, pairing, images, recorded)
        report = canaries.compare(views, record.canaries, pairing.canary_pixels())
        whose = "those that `logitcache pair` recorded"
        origin = canaries.Origin(str(pairing.store), record.versions, versions(), whose=whose)
        if warning := canaries.judge(report, verify, origin, limits):
            warnings.warn(warning, stacklevel=4)
    return _views(cache, pairing, images, recorded, shuffled=pairing.shuffled)


def _views(
    cache: "Cache", pairing: Pairing, images: ImageDataset, recorded: Recorded | None, shuffled: bool = False
) -> Views:
    rows, labels = pairing.rows, cache.labels
    if shuffled:
        rows, labels = rows[pairing.sources], labels[pairing.sources]
    manifest = cache.manifest
    classes = manifest.fingerprint.num_classes, manifest.class_names
    frame = frame_of(manifest, pairing.sizes, pairing.record.image_shape, pairing.record.colors)
    paired = paired_images(images, rows, manifest.first.num_images, labels, *classes)
    return Views(paired, manifest.views, recorded, frame)


def frame_of(manifest: Manifest, sizes: Ints, image_shape: tuple[int, int, int], colors: tuple[Color, ...]) -> Frame:
    """Return how paired images are rendered as views [C, H, W], the teacher's images being of `sizes` [N, 2]."""
    channels, *shown = image_shape
    _, *seen = manifest.image_shape
    return Frame(manifest.views, sizes, Scale((seen[0], seen[1]), (shown[0], shown[1])), channels, colors)
