"""Errors of the library, and the exit code of the command line for each.

ValueError
└── LogitCacheError              any of these; `except ValueError` still works
    ├── RecipeError          2   a recipe, an option or their combination is wrong
    │   └── RecipeErrors         several of them at once
    ├── DataError            2   an image or a label cannot be read
    │   └── RefusedError         a file names a place that needs a grant, or that is never opened
    ├── DivergenceError      2   the loss or the weights of a model in training are no longer finite
    ├── MissingExtraError    2   an optional dependency is not installed
    ├── CacheError           3   a cache is damaged, incomplete, busy or not a cache
    ├── RemoteError          3   storage at a URL does not answer, or refuses
    ├── MismatchError        4   sound, but made from other images, pixels or teachers
    │   └── ReplayMismatchError  the pixels rendered here are not those the teacher saw
    └── Stopped         75/130   SIGTERM or Ctrl-C; the same command continues
        └── KilledWorkerError  75  the system killed a process that this one had started; the same command continues
"""

import difflib
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager


class LogitCacheError(ValueError):
    """Base of every error that a user can cause and correct. It can be pickled, whatever its class takes."""

    exit_code = 2

    def __reduce__(self) -> tuple[object, ...]:
        return rebuilt, (type(self), str(self)), self.__dict__


def rebuilt(kind: "type[LogitCacheError]", text: str) -> "LogitCacheError":
    """Return an error of a class with a text, whatever its class takes."""
    return kind.__new__(kind, text)


class RecipeError(LogitCacheError):
    """A recipe, an option or their combination is wrong."""


class RecipeErrors(RecipeError):
    """Several mistakes, each an error of its own."""

    def __init__(self, errors: Sequence[LogitCacheError]) -> None:
        super().__init__(listed([str(error) for error in errors]))
        self.errors = tuple(errors)


class DataError(LogitCacheError):
    """An image or a label cannot be read; the message names it."""


class RefusedError(DataError):
    """A file names a URL or a path that is opened only if the user vouches for it, or a device, which never is."""


class RowError(DataError):
    """A row of a batch that cannot be stored, and `why`."""

    def __init__(self, row: int, why: str) -> None:
        super().__init__(f"row {row} of a batch: {why}")
        self.row, self.why = row, why


class DivergenceError(LogitCacheError):
    """The loss or the weights of a model in training are no longer finite."""


class TargetErrorWarning(UserWarning):
    """Stored logits differ from the teacher's by more than a bound."""


class MissingExtraError(LogitCacheError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs an optional dependency: pip install 'logitcache[{extra}]'")


@contextmanager
def needs_extra(what: str, extra: str) -> Iterator[None]:
    """Raise MissingExtraError if an import in the block fails: `what` needs the packages of an extra."""
    try:
        yield
    except ImportError as error:
        raise MissingExtraError(what, extra) from error


class CacheError(LogitCacheError):
    """A cache is damaged, incomplete, busy or not a cache."""

    exit_code = 3


class RemoteError(LogitCacheError):
    """Storage at a URL does not answer, or refuses; the same command continues once it does."""

    exit_code = 3


class MismatchError(LogitCacheError):
    """A cache is sound, but was made from other images, pixels or teachers."""

    exit_code = 4


class ReplayMismatchError(MismatchError):
    """The pixels rendered here are not those that the teacher saw."""


class Stopped(LogitCacheError):
    """A signal requested a stop; finished work is kept and the same command continues."""

    exit_code = 75

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        if signum == signal.SIGINT:
            self.exit_code = 130


class KilledWorkerError(Stopped):
    """The system killed a process that this one had started, most often for want of memory.

    Finished work is kept and the same command continues, as after a stop; an error of the code has another class.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message, signal.SIGKILL)


def caught(*checks: Callable[[], object]) -> list[LogitCacheError]:
    """Run checks that do not depend on one another; return what they raise."""
    found: list[LogitCacheError] = []
    for check in checks:
        try:
            check()
        except RecipeErrors as several:
            found += several.errors
        except LogitCacheError as error:
            found.append(error)
    return found


def raise_all(errors: Sequence[LogitCacheError]) -> None:
    """Raise the only error as it is, several as RecipeErrors; return if there are none."""
    if len(errors) > 1:
        raise RecipeErrors(errors)
    for error in errors:
        raise error


def listed(mistakes: Sequence[str]) -> str:
    """Return the text of one error for several mistakes: the only one as it is, or their number and each."""
    if len(mistakes) == 1:
        return mistakes[0]
    return "\n  ".join([f"{len(mistakes)} mistakes:", *(text.replace("\n", "\n  ") for text in mistakes)])


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'X'?" with the nearest known name, in any case; "" if none is near."""
    by_lower = {each.lower(): each for each in known}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return f" Did you mean '{by_lower[near[0]]}'?" if near else ""
