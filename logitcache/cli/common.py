"""What commands share: the result, the output options, and arguments of several commands."""

import gc
import inspect
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, BadParameter, Option, Typer

from logitcache.cli.completion import settings
from logitcache.errors import Stopped
from logitcache.runtime import console

if TYPE_CHECKING:
    from logitcache.student.evaluation.cost import LatencyPlan


@dataclass(frozen=True)
class CommandResult:
    """The result of a command; `text` is what people read, by default a table of the document.

    Of several processes with one result, one shows it. `follows` are the words of the command that comes next. A
    server's `serve` runs after the result is shown, until a signal, and returns the exit code.
    """

    document: Mapping[str, Any]
    text: str | None = None
    errors: tuple[str, ...] = ()
    error_type: str = ""
    exit_code: int = 0
    is_shown: bool = True
    follows: tuple[str, ...] = ()
    serve: Callable[[], int] | None = None


Recipe = Annotated[Path, Argument(metavar="RECIPE", help="A recipe: a YAML file.")]


def set_option(help: str, autocompletion: Callable[..., Any] | None = None) -> Any:
    """Return the repeatable option `--set KEY=VALUE`."""
    return Option(
        "--set",
        default_factory=list,
        show_default=False,
        metavar="KEY=VALUE",
        help=help,
        autocompletion=autocompletion,
    )


Overrides = Annotated[list[str], set_option("Change one recipe key, as in optimizer.lr=0.1; repeatable.", settings)]

Trust = Annotated[
    list[str],
    Option(
        "--trust",
        default_factory=list,
        show_default=False,
        metavar="DIGEST",
        help="Trust a cache, or a run, that names URLs or paths beyond the allow-list; repeatable.",
    ),
]

Resume = Annotated[bool, Option("--resume", help="Continue from the last checkpoint.")]
Part = Annotated[
    str | None,
    Option("--part", metavar="I/N", help="Compute only every N-th shard; parts 1/N to N/N make all, in any order."),
]
Wait = Annotated[
    bool,
    Option(
        "--wait",
        help="Wait until the cache is complete, and compute the shards of processes that die.",
    ),
]
Scheduler = Annotated[
    str | None,
    Option("--scheduler", metavar="ADDRESS", help="Use the workers of a Dask scheduler, as in tcp://host:8786."),
]
Workers = Annotated[
    int | None,
    Option(
        "--workers", min=1, metavar="N", help="Use N processes on this machine, with one GPU each if there are GPUs."
    ),
]

BatchSizes = Annotated[
    list[int],
    Option("--batch-size", min=1, metavar="N", show_default="1, 32", help="Batch size to time; repeatable."),
]
Threads = Annotated[
    list[int],
    Option("--threads", min=1, metavar="N", show_default="all", help="CPU threads to time with; repeatable."),
]
Repeats = Annotated[
    int | None,
    Option("--repeats", min=1, metavar="N", show_default="30", help="Timed batches, of which the median is taken."),
]
WarmUp = Annotated[
    int | None, Option("--warm-up", min=1, metavar="N", show_default="5", help="Untimed batches before them.")
]

_Quiet = Annotated[bool, Option("-q", "--quiet", help="Show no progress.")]
_Verbose = Annotated[bool, Option("-v", "--verbose", help="Show more messages.")]
# `main` reads these two itself, since they matter when the rest cannot be parsed.
_Json = Annotated[bool, Option("--json", help="Print one JSON document on stdout.")]
_Debug = Annotated[bool, Option("--debug", help="Show the traceback of an error.")]

_OUTPUT_OPTIONS = {"quiet": _Quiet, "verbose": _Verbose, "json": _Json, "debug": _Debug}


def granted(trust: list[str]) -> list[str]:
    """Return the override of a recipe for --trust."""
    return [f"trust=[{', '.join(trust)}]"] if trust else []


def latency_plan(
    latency: bool, batch_sizes: list[int], threads: list[int], repeats: int | None, warm_up: int | None
) -> "LatencyPlan | None":
    """Return how to time models; None without --latency. Raises BadParameter for options that need it."""
    options = {"--batch-size": batch_sizes, "--threads": threads, "--repeats": repeats, "--warm-up": warm_up}
    unused = [option for option, value in options.items() if value and not latency]
    if unused:
        raise BadParameter("has no effect: nothing is timed without --latency", param_hint=unused)
    if not latency:
        return None
    from logitcache.student.evaluation.cost import LatencyPlan

    timing = {"batch_sizes": tuple(batch_sizes), "threads": tuple(threads), "repeats": repeats, "warm_up": warm_up}
    return LatencyPlan.model_validate({key: value for key, value in timing.items() if value})


def as_options(overrides: list[str]) -> list[str]:
    """Return the words that make the same overrides."""
    return [word for change in overrides for word in ("--set", change)]


@contextmanager
def _signals_stop() -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into Stopped, outside the loops that stop in their own way."""
    received: list[int] = [signal.SIGINT]

    def terminate(signum: int, frame: FrameType | None) -> None:
        received[0] = signum
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except KeyboardInterrupt:
        # Cleaning up may take long, and a second Ctrl-C must not wait for it.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        message = "interrupted; what was finished is kept"
        raise Stopped(message, received[0]) from None


def _import_torch() -> None:
    """Import torch before anything else, without garbage collection: no module is garbage.

    Each full collection would walk all objects that were imported so far, tenths of a second in all.
    """
    if "torch" in sys.modules:
        return
    gc.disable()
    try:
        import torch  # noqa: F401
    finally:
        gc.freeze()
        gc.enable()


def add_command(
    app: Typer, name: str, function: Callable[..., CommandResult], uses_torch: bool, **help_texts: Any
) -> None:
    """Register a function under a name, with the output options added to its own.

    `help_texts` go to Typer.
    """

    @wraps(function)
    def run(**options: Any) -> CommandResult:
        output = {option: options.pop(option) for option in _OUTPUT_OPTIONS}
        console.configure(quiet=output["quiet"], verbose=output["verbose"])
        with _signals_stop():
            if uses_torch:
                _import_torch()
            return function(**options)

    signature = inspect.signature(function)
    added = [
        inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
        for option, kind in _OUTPUT_OPTIONS.items()
    ]
    parameters = [*signature.parameters.values(), *added]
    # Typer reads both.
    run.__dict__["__signature__"] = signature.replace(parameters=parameters)
    run.__annotations__ = function.__annotations__ | _OUTPUT_OPTIONS
    app.command(name, **help_texts)(run)
