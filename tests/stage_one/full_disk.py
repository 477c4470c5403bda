"""Fill a small disk: a program that is run in a mount namespace of its own.

    unshare -Urm python -m tests.stage_one.full_disk DIRECTORY

Exits 77 where no tmpfs can be mounted; else prints what was found, as JSON.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from logitcache.cache.cache import Cache
from logitcache.cache.snapshot import open_snapshot
from logitcache.cache.verify import damaged
from logitcache.errors import CacheError
from tests.cache.made import Linear, Pixels, contents, run


def mount(disk: Path, *options: str) -> bool:
    command = ["mount", "-t", "tmpfs", *options, "none", str(disk)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def main(root: Path) -> dict[str, Any] | None:
    disk = root / "disk"
    disk.mkdir()
    if not mount(disk, "-o", "size=480k"):
        return None
    path, changes = disk / "c.zarr", {"shard_rows": 256, "batch_size": 128}
    teacher = Linear(128)  # whose rows are wide, so that few images fill the disk
    images = Pixels(750)
    try:
        run(path, images, teacher, **changes)
        raise AssertionError("the disk is not full")
    except CacheError as error:
        message = str(error)
    cache = Cache(open_snapshot(path))
    sound = not damaged(cache.snapshot)
    assert mount(disk, "-o", "remount,size=8m")
    result = run(path, images, teacher, **changes)
    run(root / "w.zarr", images, teacher, **changes)
    return {
        "error": message,
        "sound": sound,
        "committed": len(cache.shards),
        "shards": result.shards,
        "written": result.shards_written,
        "identical": contents(path) == contents(root / "w.zarr"),
    }


if __name__ == "__main__":
    found = main(Path(sys.argv[1]))
    if found is None:
        sys.exit(77)
    print(json.dumps(found))
