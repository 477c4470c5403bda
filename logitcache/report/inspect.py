"""What a cache is: who made it, how complete, how good and how big."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcache.cache.create import read_manifest
from logitcache.cache.layout import ArrayGroup, Shard, TeacherLayout
from logitcache.cache.reader import Cache
from logitcache.cache.verify import stored_bytes
from logitcache.targets import top1
from logitcache.views.keys import ViewKey

ROWS = 4096


def inspect_cache(path: str | Path) -> dict[str, Any]:
    """Describe a cache, finished or not, without reading more than one view of it.

    `top1` is the teacher's accuracy on the labelled images of view 0, as it saw them, of the shards that are committed;
    a mixed image has the label of its larger part.
    """
    root = Path(path)
    cache = Cache(root, read_manifest(root))
    manifest, layout = cache.manifest, cache.layout
    done = cache.shards
    return {
        "cache": str(root),
        "complete": cache.complete,
        "shards": layout.num_views * layout.shards_per_view,
        "shards_committed": len(done),
        "bytes": stored_bytes(root),
        "images": manifest.num_images,
        "views": manifest.views.num_views,
        "image_shape": list(manifest.image_shape),
        "shard_rows": manifest.shard_rows,
        "seed": manifest.views.seed,
        "augmentations": [
            _entry(item.model_dump(mode="json", exclude={"ratio_knots"})) for item in manifest.views.augmentations
        ],
        "mixing": [_entry(item.model_dump(mode="json", exclude={"thresholds"})) for item in manifest.views.mixing],
        "targets": manifest.views.targets,
        "dataset": None if manifest.dataset is None else _entry(manifest.dataset.model_dump(mode="json")),
        "fingerprint": manifest.fingerprint.content,
        "teachers": {teacher.name: _teacher(cache, teacher, done) for teacher in layout.teachers},
        "recorded": None if layout.views is None else _array_bytes(cache, layout.views, done),
        "identity": manifest.digest(),
        "versions": manifest.versions,
    }


def _teacher(cache: Cache, teacher: TeacherLayout, done: list[Shard]) -> dict[str, Any]:
    entry = teacher.entry
    return {
        "model": _entry(entry.model),
        "weights": entry.weights,
        "classes": entry.num_classes,
        "logits": _entry(entry.logits.model_dump(mode="json")),
        "precision": entry.precision,
        "top1": _accuracy(cache, teacher, [shard for shard in done if shard.view == 0]),
        **_array_bytes(cache, teacher, done),
    }


def _array_bytes(cache: Cache, group: ArrayGroup[Any], done: list[Shard]) -> dict[str, Any]:
    """Say what the arrays of a group take on the disk, in all and by row."""
    arrays = {array.name: sum(_size(cache.path / array.file(shard)) for shard in done) for array in group.arrays}
    rows = sum(shard.stop - shard.start for shard in done)
    return {"array_bytes": arrays, "bytes_per_row": round(sum(arrays.values()) / rows, 1) if rows else None}


def _accuracy(cache: Cache, teacher: TeacherLayout, shards: list[Shard]) -> float | None:
    hits = labelled = 0
    for shard in shards:
        for start in range(shard.start, shard.stop, ROWS):
            indices = np.arange(start, min(start + ROWS, shard.stop))
            keys = [ViewKey(0, index) for index in indices.tolist()]
            labels = _labels(cache, keys)
            answers = top1(cache.answers(keys)[teacher.name]).numpy()
            hits += int((answers == labels).sum())
            labelled += int((labels >= 0).sum())
    return hits / labelled if labelled else None


def _labels(cache: Cache, keys: list[ViewKey]) -> NDArray[np.int64]:
    """Return the labels of views as a teacher saw them; of a mixed one, that of the larger part."""
    labels = cache.labels[[key.index for key in keys]]
    _, height, width = cache.manifest.image_shape
    mixture = cache.manifest.views.answered().mixture(keys, len(cache), (height, width))
    return labels if mixture is None else np.where(mixture.share < 0.5, cache.labels[mixture.partners], labels)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _entry(value: object) -> str:
    """Write a recipe entry on one line."""
    if not isinstance(value, dict):
        return "given as an object" if value is None else str(value)
    return (
        "{"
        + ", ".join(f"{key}: {_entry(item) if isinstance(item, dict) else item}" for key, item in value.items())
        + "}"
    )
