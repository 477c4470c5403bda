"""A preload of Dask's workers that has so many of them killed as they start."""

import os
import signal
from pathlib import Path

from logitcache.runtime.stopping import ignore_signals

FOLDER, COUNT = "LOGITCACHE_TEST_KILLED", "LOGITCACHE_TEST_KILLS"


def dask_setup(worker: object) -> None:
    """Die, unless enough have died; each leaves a file."""
    killed = Path(os.environ[FOLDER])
    if len(list(killed.iterdir())) < int(os.environ[COUNT]):
        (killed / str(os.getpid())).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    ignore_signals()
