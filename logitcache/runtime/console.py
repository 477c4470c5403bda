"""What a user sees: results on stdout; errors, log messages and progress on stderr.

The library logs to the logger `logitcache` and is silent unless a caller adds a handler, as the command line does by
`configure`. Text may come from a cache, a file name or a server: `visible` escapes what a terminal would obey.
"""

import logging
import sys
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress

T = TypeVar("T")

LINE_SECONDS = 5.0

_INVISIBLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode categories: controls, format characters (bidirectional overrides, …), surrogates, line separators."""

logger = logging.getLogger("logitcache")


class _Handler(logging.Handler):
    """Print log messages on the console, above any progress bar. Without a console nothing is shown."""

    console: "Console | None" = None
    progress: "Progress | None" = None
    above: "Callable[[], RenderableType] | None" = None

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line."""
        if self.console is not None:
            self.console.print(record.getMessage(), markup=False, highlight=False, emoji=False)


_output = _Handler()


def _escape(record: logging.LogRecord) -> bool:
    """Escape a message for the handlers of any caller: a file of theirs can be UTF-8, and a terminal obeys nothing."""
    record.msg, record.args = visible(record.getMessage()), ()
    return True


logger.addFilter(_escape)


def visible(text: str, keep: str = "\n\t") -> str:
    r"""Escape characters that terminals obey or hide, as Python does: `\x1b`, `\u202e`; those of `keep` stay."""
    if text.isascii() and (text.replace("\n", "") if "\n" in keep else text).isprintable():
        return text
    return "".join(
        c if c in keep or unicodedata.category(c) not in _INVISIBLE else c.encode("unicode_escape").decode()
        for c in text
    )


def write(text: str, *, err: bool = False) -> None:
    """Write text on stdout, or on stderr; what the stream's encoding lacks is escaped too."""
    stream = sys.stderr if err else sys.stdout
    encoding = stream.encoding or "utf-8"
    stream.write(visible(text).encode(encoding, "backslashreplace").decode(encoding))
    stream.flush()


@contextmanager
def errors_alone(name: str | None = None) -> Iterator[None]:
    """Silence what a logger of others, by default the root, logs below errors in the block."""
    other = logging.getLogger(name)
    before = other.level
    other.setLevel(logging.ERROR)
    try:
        yield
    finally:
        other.setLevel(before)


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Show warnings without the line of our code that raised them."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_args, **_options: f"Warning: {visible(str(message))}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


def configure(*, quiet: bool = False, verbose: bool = False) -> None:
    """Show log messages and progress on stderr from now on; nothing if quiet, debug messages too if verbose."""
    from rich.console import Console

    finish()
    # A narrow log must not break a message into two lines.
    _output.console = None if quiet else Console(stderr=True, soft_wrap=True)
    logger.addHandler(_output)
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    logger.propagate = False  # or a handler of the user's own code would show each line again


def finish() -> None:
    """Remove a bar that an error left on the terminal."""
    if _output.progress is not None:
        _output.progress.stop()
        _output.progress = None


@contextmanager
def silenced() -> Iterator[None]:
    """Log nothing and show no progress within the block."""
    shown, _output.console, logger.disabled = _output.console, None, True
    try:
        yield
    finally:
        _output.console, logger.disabled = shown, False


@contextmanager
def shown_above(render: "Callable[[], RenderableType]") -> Iterator[bool]:
    """Show what a function renders above the bars within the block, as it changes; yield whether a terminal does.

    A log file gets none of it.
    """
    if _output.console is None or not _output.console.is_terminal:
        yield False
        return
    _output.above = render
    _output.progress = _start_progress()
    try:
        yield True
    finally:
        finish()
        _output.above = None


def track(iterable: Iterable[T], description: str, total: int, unit: str = "images", done: int = 0) -> Iterator[T]:
    """Yield the items and show how many of `total` were taken, counted from `done`."""
    if _output.console is None:
        return iter(iterable)
    show = _with_bar if _output.console.is_terminal else _with_lines
    return show(iterable, description, total, unit, done)


def _with_lines(iterable: Iterable[T], description: str, total: int, unit: str, done: int) -> Iterator[T]:
    started = last = time.monotonic()
    count = 0
    for count, item in enumerate(iterable, 1):
        yield item
        now = time.monotonic()
        if now - last >= LINE_SECONDS and done + count < total:
            last = now
            rate = count / (now - started)
            left = duration((total - done - count) / rate)
            percent = 100 * (done + count) // total
            logger.info(f"{description}: {done + count}/{total} {unit} ({percent} %), {rate:.3g} {unit}/s, {left} left")
    seconds = time.monotonic() - started
    if seconds >= LINE_SECONDS:
        logger.info(f"{description}: {done + count}/{total} {unit} in {duration(seconds)}")


def _with_bar(iterable: Iterable[T], description: str, total: int, unit: str, done: int) -> Iterator[T]:
    """Show a bar; a bar within a bar is another line of the same display."""
    outer, progress = _output.progress, _output.progress or _start_progress()
    _output.progress = progress
    task = progress.add_task(visible(description, keep=""), total=total, completed=done, unit=unit)
    try:
        for item in iterable:
            yield item
            progress.advance(task)
    finally:
        progress.remove_task(task)
        if outer is None and _output.progress is progress:
            finish()


def _start_progress() -> "Progress":
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    class Display(Progress):
        """Bars, and above them what `shown_above` renders."""

        def get_renderables(self) -> "Iterable[RenderableType]":
            if _output.above is not None:
                yield _output.above()
            yield from super().get_renderables()

    text, unit = (TextColumn(field, markup=False) for field in ("{task.description}", "{task.fields[unit]}"))
    columns = (text, BarColumn(), MofNCompleteColumn(), unit, TimeRemainingColumn())
    progress = Display(*columns, console=_output.console, transient=True)
    progress.start()
    return progress


def duration(seconds: float) -> str:
    """Write 3.2 s, 75 s, 4:05 min or 2:03 h."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes < 100 else f"{minutes // 60}:{minutes % 60:02d} h"
