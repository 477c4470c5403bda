"""Processes of their own: started, waited for, and ended. Nothing waits for ever, and what was seen is told."""

import gc
import importlib
import json
import os
import pkgutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import logitcache
from tests.warm import REPOSITORY as REPOSITORY
from tests.warm import Program


def program(name: str, folder: Path, seconds: float = 300) -> Any:
    """Run a program of this folder on a directory, and return the JSON that it prints; it leaves no process behind."""
    with Program(f"tests.stage_one.{name}", str(folder)) as process:
        code = process.wait(seconds)
        process.end(signal.SIGABRT)  # those that hang print their stacks
        assert code == 0, f"{name}: {f'still runs after {seconds} s' if code is None else code}\n{process.errors}"
        return json.loads(process.out)


def stopped(arguments: list[str], signum: int, committed: Callable[[], int]) -> tuple[int | None, str]:
    """Run `logitcache` and signal it once something is committed; returns its exit code and what is on its stderr."""
    with Program("logitcache", *arguments) as process:
        until(lambda: committed() or process.poll() is not None)
        process.signal(signum)
        return process.wait(120), process.errors


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
