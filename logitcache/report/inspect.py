"""What a cache is: who made it, how complete, how good and how big."""

from pathlib import Path
from typing import Any

import numpy as np

from logitcache.cache.create import read_manifest
from logitcache.cache.layout import Shard, TeacherLayout
from logitcache.cache.reader import Cache
from logitcache.cache.verify import stored_bytes
from logitcache.targets import top1
from logitcache.views.keys import ViewKey

ROWS = 4096


def inspect_cache(path: str | Path) -> dict[str, Any]:
    """Describe a cache, finished or not, without reading more than one view of it.

    `top1` is the teacher's accuracy on the labelled images of view 0, as it saw them, of the shards that are committed.
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
        "dataset": None if manifest.dataset is None else _entry(manifest.dataset.model_dump(mode="json")),
        "fingerprint": manifest.fingerprint.content,
        "teachers": {teacher.name: _teacher(cache, teacher, done) for teacher in layout.teachers},
        "identity": manifest.digest(),
        "versions": manifest.versions,
    }


def _teacher(cache: Cache, teacher: TeacherLayout, done: list[Shard]) -> dict[str, Any]:
    entry = teacher.entry
    arrays = {array.name: sum(_size(cache.path / array.file(shard)) for shard in done) for array in teacher.arrays}
    rows = sum(shard.stop - shard.start for shard in done)
    return {
        "model": _entry(entry.model),
        "weights": entry.weights,
        "classes": entry.num_classes,
        "logits": _entry(entry.logits.model_dump(mode="json")),
        "precision": entry.precision,
        "top1": _accuracy(cache, teacher, [shard for shard in done if shard.view == 0]),
        "array_bytes": arrays,
        "bytes_per_row": round(sum(arrays.values()) / rows, 1) if rows else None,
    }


def _accuracy(cache: Cache, teacher: TeacherLayout, shards: list[Shard]) -> float | None:
    hits = labelled = 0
    for shard in shards:
        for start in range(shard.start, shard.stop, ROWS):
            indices = np.arange(start, min(start + ROWS, shard.stop))
            labels = cache.labels[indices]
            answers = top1(cache.rows([ViewKey(0, index) for index in indices.tolist()])[teacher.name].logits).numpy()
            hits += int((answers == labels).sum())
            labelled += int((labels >= 0).sum())
    return hits / labelled if labelled else None


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
