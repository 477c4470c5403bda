"""Processes of their own: started, waited for, and ended. Nothing waits for ever, and what was seen is told."""

import gc
import importlib
import json
import os
import pkgutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import logitcache

REPOSITORY = Path(__file__).parents[2]


def program(name: str, folder: Path, seconds: float = 300) -> Any:
    """Run a program of this folder on a directory, and return the JSON that it prints; it leaves no process behind."""
    command = [sys.executable, "-X", "faulthandler", "-m", f"tests.stage_one.{name}", str(folder)]
    # Not pipes: a process that is left behind would hold them open.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=out, stderr=errors, start_new_session=True)
        code = None
        try:
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(seconds)
        finally:
            _end(process, signal.SIGABRT)  # those that hang print their stacks
        out.seek(0)
        errors.seek(0)
        assert code == 0, f"{name}: {f'still runs after {seconds} s' if code is None else code}\n{errors.read()}"
        return json.loads(out.read())


def stopped(arguments: list[str], signum: int, committed: Callable[[], int]) -> tuple[int, str]:
    """Run `logitcache` and signal it once something is committed; returns its exit code and what is on its stderr."""
    command = [sys.executable, "-m", "logitcache", *arguments]
    options: dict[str, Any] = {"cwd": REPOSITORY, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(command, **options) as process:
        try:
            until(lambda: committed() or process.poll() is not None)
            # To workers too, as a terminal and a scheduler do.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signum)
            errors: str = process.communicate(timeout=120)[1]
            return process.returncode, errors
        finally:
            _end(process, signal.SIGKILL)


def _end(process: "subprocess.Popen[Any]", signum: int) -> None:
    """End a process and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signum)
    process.wait()


def import_package() -> None:
    """Import every module of the package in this process, so that no fork has to."""
    for module in pkgutil.walk_packages(logitcache.__path__, "logitcache."):
        importlib.import_module(module.name)


def forked(action: Callable[[], int]) -> int:
    """Start a child that does something and exits with its result; returns its id."""
    gc.freeze()  # a collection writes into all that it looks at, which would be copied
    child = os.fork()
    if child == 0:
        status = 99
        try:
            status = action()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def ended(child: int, seconds: float = 100) -> int:
    """Wait for a child, and return its exit code; one that hangs is aborted, and told."""
    deadline = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGABRT)
            os.waitpid(child, 0)
            raise AssertionError(f"process {child} did not end within {seconds} s")
        time.sleep(0.005)


def by_two(items: Sequence[Any], action: Callable[[Any], Any], seconds: float = 100) -> list[Any]:
    """Do something with each item, every second one in another fork of this process; returns the results, as of JSON.

    Raises AssertionError if a fork fails, or takes longer than `seconds`.
    """
    with tempfile.TemporaryDirectory() as folder:

        def some(first: int) -> int:
            Path(folder, str(first)).write_text(json.dumps([action(item) for item in items[first::2]]))
            return 0

        children = [forked(lambda first=first: some(first)) for first in (0, 1)]  # type: ignore[misc]
        assert [ended(child, seconds) for child in children] == [0, 0]
        found: list[Any] = [None] * len(items)
        for first in (0, 1):
            found[first::2] = json.loads(Path(folder, str(first)).read_text())
    return found


def until(seen: Callable[[], int], at_least: int = 1, seconds: float = 100) -> None:
    """Wait until so many are seen; fails with how many were where that takes too long."""
    deadline = time.monotonic() + seconds
    while (count := seen()) < at_least:
        assert time.monotonic() < deadline, f"{count} seen within {seconds} s, and not {at_least}"
        time.sleep(0.002)
