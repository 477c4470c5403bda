"""All that is printed: answers on stdout; errors, messages and progress on stderr, of which a library shows nothing.

Text may hold what a cache, a file name or a server says. Everything printed passes `visible`, so that none of it
reaches the terminal as a command.
"""

import sys
import time
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

T = TypeVar("T")

LINE_SECONDS = 5.0

_INVISIBLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode categories: controls, format characters (of bidirectional text, say), surrogates, line separators."""


class _Output:
    """What this process shows; silent until `configure` is called."""

    def __init__(self) -> None:
        self.console: Console | None = None
        self.progress: Progress | None = None
        self.verbose = False


_output = _Output()


def visible(text: str, keep: str = "\n\t") -> str:
    r"""Escape characters that terminals obey or hide, as Python does: `\x1b`, `\u202e`; those of `keep` stay."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in keep or unicodedata.category(c) not in _INVISIBLE else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def write(text: str, *, err: bool = False) -> None:
    """Write text on stdout, or on stderr; what the stream's encoding lacks is escaped too."""
    stream = sys.stderr if err else sys.stdout
    encoding = stream.encoding or "utf-8"
    stream.write(visible(text).encode(encoding, "backslashreplace").decode(encoding))
    stream.flush()


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Show warnings without the place in our code that they came from."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_args, **_options: f"Warning: {visible(str(message))}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


def configure(*, quiet: bool = False, verbose: bool = False) -> None:
    """Show progress and messages on stderr from now on; nothing if quiet, details if verbose."""
    from rich.console import Console

    finish()
    # A narrow log must not break a message into two lines.
    _output.console = None if quiet else Console(stderr=True, soft_wrap=True)
    _output.verbose = verbose


def finish() -> None:
    """Take a bar that an error left behind off the terminal."""
    if _output.progress is not None:
        _output.progress.stop()
        _output.progress = None


@contextmanager
def hushed() -> Iterator[None]:
    """Show nothing while the block runs: for one step of several that are told together."""
    shown, _output.console = _output.console, None
    try:
        yield
    finally:
        _output.console = shown


def say(message: str) -> None:
    """Write one line on stderr, above any bar."""
    if _output.console is not None:
        _output.console.print(visible(message), markup=False, highlight=False, emoji=False)


def detail(message: str) -> None:
    """Write one line on stderr when verbose."""
    if _output.verbose:
        say(message)


def track(iterable: Iterable[T], description: str, total: int, unit: str = "images", done: int = 0) -> Iterator[T]:
    """Pass items on and show how many of `total` were taken, counted from `done`."""
    if _output.console is None:
        yield from iterable
    elif _output.console.is_terminal:
        yield from _with_bar(iterable, description, total, unit, done)
    else:
        yield from _with_lines(iterable, description, total, unit, done)


def _with_lines(iterable: Iterable[T], description: str, total: int, unit: str, done: int) -> Iterator[T]:
    started = last = time.monotonic()
    count = 0
    for count, item in enumerate(iterable, 1):
        yield item
        now = time.monotonic()
        if now - last >= LINE_SECONDS and done + count < total:
            last = now
            rate = count / (now - started)
            left = _duration((total - done - count) / rate)
            percent = 100 * (done + count) // total
            say(f"{description}: {done + count}/{total} {unit} ({percent} %), {rate:.3g} {unit}/s, {left} left")
    seconds = time.monotonic() - started
    if seconds >= LINE_SECONDS:
        say(f"{description}: {done + count}/{total} {unit} in {_duration(seconds)}")


def _with_bar(iterable: Iterable[T], description: str, total: int, unit: str, done: int) -> Iterator[T]:
    with _shared_progress() as progress:
        task = progress.add_task(visible(description, keep=""), total=total, completed=done, unit=unit)
        try:
            for item in iterable:
                yield item
                progress.advance(task)
        finally:
            progress.remove_task(task)


@contextmanager
def _shared_progress() -> "Iterator[Progress]":
    """Yield the bars of this terminal; a bar within a bar joins it as another line."""
    if _output.progress is not None:
        yield _output.progress
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}", markup=False),
        TimeRemainingColumn(),
    )
    progress = Progress(*columns, console=_output.console, transient=True)
    with progress:
        _output.progress = progress
        try:
            yield progress
        finally:
            if _output.progress is progress:
                _output.progress = None


def _duration(seconds: float) -> str:
    """Write 3.2 s, 75 s, 4:05 min or 2:03 h."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes < 100 else f"{minutes // 60}:{minutes % 60:02d} h"
