"""Kill `materialize`, `import-targets` and `synthesize` at random moments: a program run apart, as `killing` is.

    python -m tests.stage_one.killing_imports DIRECTORY [TIMES]

Prints a JSON list with what was found after each resume, of TIMES as many kills as the tests need.
"""

import json
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from logitcache.classifier import Classifier
from logitcache.stage_one.materialize import materialize as module
from logitcache.stage_one.precompute import precompute
from logitcache.stage_one.synthesize.synthesize import synthesize
from tests.cache.made import DENSE16, Linear, contents, recipe, teacher
from tests.stage_one.apart import ended, forked
from tests.stage_one.killing import counting
from tests.stage_one.synthesized import PREPROCESSING, learner, synthesis
from tests.stage_one.test_import_targets import KEPT, answered, imported, views, write_npz

NUM_KILLS = 5
"""Of each command; `synthesize` is killed three more times."""


def materialized(path: Path) -> int:
    """Write six files of views; return how many were written."""
    module.FILE_BYTES = 40 * 3 * 4 * 4
    return module.materialize(recipe(path / "x.zarr", **KEPT), path / "v").files_written


def synthesized(path: Path) -> int:
    """Make four batches of images, and two of an adaptive round; return how many were written."""
    first = synthesize(synthesis(), path / "s").batches_written
    student = Classifier(learner(), PREPROCESSING)
    return first + synthesize(synthesis(num_batches=2), path / "s", student=student).batches_written


def importing(answers: Path) -> Callable[[Path], int]:
    """Return what imports six shards; it returns how many were written."""

    def run(path: Path) -> int:
        kept = {**KEPT, "teachers": {"t": teacher(DENSE16, model=imported(answers))}}
        return precompute(recipe(path / "c.zarr", **kept)).shards_written

    return run


def killed(name: str, root: Path, run: Callable[[Path], int], count: int) -> list[dict[str, Any]]:
    """Kill a run at moments spread over its life, and a run that continues every second of them."""
    whole = root / "whole"
    whole.mkdir(parents=True)
    assert ended(forked(lambda: counting(None, root / "calls", lambda: run(whole)))) == 6
    calls, expected, generator = int((root / "calls").read_text()), contents(whole), random.Random(7)
    found = []
    for number in range(count):
        path = root / str(number)
        path.mkdir()
        for _ in range(1 + number % 2):
            first = calls * number // count
            point = generator.randrange(first, max(first + 1, calls * (number + 1) // count))
            child = forked(lambda point=point, path=path: counting(point, None, lambda: run(path)))  # type: ignore[misc]
            assert ended(child) in (-signal.SIGKILL, *range(7))
        before = len(contents(path))
        written = ended(forked(lambda path=path: run(path)))  # type: ignore[misc]
        identical = contents(path) == expected
        found.append({"command": name, "before": before, "written": written, "identical": identical})
    return found


def main(root: Path, times: int = 1) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    os.environ["XDG_CACHE_HOME"] = str(root / "home")
    rows = views(root / "views", root / "x.zarr")
    write_npz(root / "answers.npz", answered(rows, Linear(16)))
    assert isinstance(rows["pixels"], np.ndarray)
    count = times * NUM_KILLS
    return [
        *killed("materialize", root / "materialize", materialized, count),
        *killed("import-targets", root / "import", importing(root / "answers.npz"), count),
        *killed("synthesize", root / "synthesize", synthesized, count + 3 * times),
    ]


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), *map(int, sys.argv[2:]))))
