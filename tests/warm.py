"""Processes that begin warm: forks of one server that has imported the package, for which a cold interpreter takes
seconds. What a test says of the start itself needs a cold one.
"""

import atexit
import faulthandler
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
_PRELOADED = "tests.preloaded"


def start_server() -> None:
    """Start the server of this process, unless it runs; workers of Dask and of loaders that ask for one come of it."""
    forkserver.set_forkserver_preload([_PRELOADED])
    forkserver.ensure_running()


class Program:
    """`python -m MODULE ARGUMENTS`, warm, in the repository and in a session of its own; as a context, it is ended."""

    def __init__(self, module: str, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        start_server()
        self._folder = tempfile.TemporaryDirectory()
        self._out, self._errors = (Path(self._folder.name, name) for name in ("out", "errors"))
        given = (module, arguments, dict(environment or os.environ), self._out, self._errors)
        self._process = multiprocessing.get_context("forkserver").Process(target=_run, args=given)
        self._process.start()

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *error: Any) -> None:
        self.end(signal.SIGKILL)
        self._folder.cleanup()

    def poll(self) -> int | None:
        """Return the exit code, negative as of a signal; None while it runs."""
        return self._process.exitcode

    def wait(self, seconds: float) -> int | None:
        """Wait for the end, and return the exit code; None after so many seconds."""
        self._process.join(seconds)
        return self.poll()

    def signal(self, signum: int) -> None:
        """Signal it and its children, as a terminal and a scheduler do."""
        with suppress(ProcessLookupError):
            os.killpg(self._pid, signum)

    def end(self, signum: int) -> None:
        """End it, and all that it started, by a signal."""
        self.signal(signum)
        with suppress(ProcessLookupError):
            if self.poll() is None:  # it has no session yet
                os.kill(self._pid, signum)
        self._process.join()

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def errors(self) -> str:
        return self._errors.read_text()

    @property
    def _pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid


def _run(module: str, arguments: tuple[str, ...], environment: dict[str, str], out: Path, errors: Path) -> None:
    """Be the program; ends as an interpreter does, which multiprocessing does in part."""
    os.setsid()
    os.chdir(REPOSITORY)
    os.environ.clear()
    os.environ.update(environment)
    for file, descriptor in ((out, 1), (errors, 2)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    faulthandler.enable()
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
