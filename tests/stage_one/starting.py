"""A cluster of this machine whose workers are killed while they start: a program that is run apart.

    python -m tests.stage_one.starting DIRECTORY COUNT

Prints, as JSON, how many were killed, and whether the cache is that of one process.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from logitcache.stage_one.cluster import workers
from logitcache.stage_one.precompute import precompute
from tests.cache.made import contents
from tests.stage_one import dying
from tests.stage_one.test_cluster import named


def main(root: Path, count: int, num_workers: int = 2) -> dict[str, Any]:
    (root / "killed").mkdir()
    os.environ |= {dying.FOLDER: str(root / "killed"), dying.COUNT: str(count)}
    workers.PRELOAD = dying.__name__
    precompute(named(root / "c.zarr"), workers=num_workers)
    precompute(named(root / "w.zarr"))
    killed = len(list((root / "killed").iterdir()))
    return {"killed": killed, "identical": contents(root / "c.zarr") == contents(root / "w.zarr")}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]))))
