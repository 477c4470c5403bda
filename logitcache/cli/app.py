"""`main`: run one command, print its answer or its error, give its exit code."""

import contextlib
import functools
import json
import os
import shlex
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from typer import BadParameter
from typer.main import get_command

from logitcache.cli.commands import app
from logitcache.cli.common import CommandResult
from logitcache.errors import LogitCacheError, Stopped
from logitcache.runtime import console

EXIT_BUG = 1
EXIT_USAGE = 2
EXIT_BROKEN_PIPE = 141  # what a shell reports for a program that SIGPIPE ended

# The class of all usage errors: Typer exports only this one of its members.
UsageError: type[Exception] = BadParameter.__mro__[1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line without the program's name; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter flushes stdout once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    return code


def _run(arguments: list[str]) -> int:
    as_json = "--json" in arguments
    # A library, or the user's own code, must not print into the one document.
    aside = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
    resume = ""
    try:
        with aside, console.warnings_as_lines():
            answer = _command()(arguments or ["--help"], prog_name="logitcache", standalone_mode=False)
    except BrokenPipeError:
        raise
    except Exception as error:
        console.finish()
        code, message = _explain(error, debug="--debug" in arguments)
        answer = CommandResult({}, "", (message,), type(error).__name__, code)
        if isinstance(error, Stopped):
            flag = ["--resume"] if arguments[0].startswith("train-") and "--resume" not in arguments else []
            resume = f"Resume: {shlex.join(['logitcache', *arguments, *flag])}\n"
    if not isinstance(answer, CommandResult):
        return int(answer or 0)  # of --help and --version
    if answer.is_shown:
        _print(answer, as_json)
        console.write(resume, err=True)
    return answer.exit_code if answer.serve is None else answer.serve()


@functools.cache
def _command() -> Any:
    """Build the command line once: Typer's own call would build every command each time."""
    return get_command(app)


def _print(answer: CommandResult, as_json: bool) -> None:
    document, text = answer.document, answer.text
    if as_json:
        if answer.errors:
            error = {"type": answer.error_type, "message": "\n".join(answer.errors), "exit_code": answer.exit_code}
            document = {**document, "error": error}
        text = f"{json.dumps(_plain(document), indent=2, allow_nan=False)}\n"
    elif text is None:
        from logitcache.runtime.tables import as_text

        text = as_text(document)
    console.write(text)
    for message in answer.errors:
        console.write(f"Error: {message}\n", err=True)
    if answer.follows and not answer.errors and not as_json:
        console.logger.info(f"Next: {shlex.join(['logitcache', *answer.follows])}")


def _explain(error: Exception, debug: bool) -> tuple[int, str]:
    """Choose the exit code and the message; a bug leaves its traceback in a file."""
    trace = console.visible("".join(traceback.format_exception(error)))
    if debug:
        console.write(trace, err=True)
    if isinstance(error, OSError):
        from logitcache.store.files import refused_by_system

        error = refused_by_system(error)
    if isinstance(error, LogitCacheError):
        return error.exit_code, str(error)
    if isinstance(error, UsageError):
        usage: Any = error  # Typer's base class, which it does not export
        command = "logitcache" if usage.ctx is None else usage.ctx.command_path
        return EXIT_USAGE, f"{usage.format_message()}\n  Fix: see `{command} --help`"
    summary = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    if debug:
        return EXIT_BUG, f"this is a bug in logitcache or in your own code: {summary}"
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="logitcache-", suffix=".txt", delete=False, encoding="utf-8"
        ) as file:
            file.write(trace)
    except OSError:  # a full disk may have been the cause
        console.write(trace, err=True)
        return EXIT_BUG, f"this is a bug: {summary}"
    return EXIT_BUG, f"this is a bug: {summary} (traceback in {file.name}; --debug shows it)"


def _plain(value: Any) -> Any:
    """Convert to plain JSON values: NaN becomes null, numpy's numbers and tensors plain numbers."""
    match value:
        case str():
            return value
        case os.PathLike():
            return os.fspath(value)
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
    from pydantic_core import to_jsonable_python

    return to_jsonable_python(value, inf_nan_mode="null", fallback=lambda other: other.tolist(), by_alias=True)
