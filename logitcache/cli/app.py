"""`main`: run one command, print its answer or its error, give its exit code."""

import contextlib
import json
import os
import shlex
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from typer import BadParameter

from logitcache.cli.commands import app
from logitcache.cli.common import Answer
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
    # Whatever a library or the user's own code prints must not spoil the one document.
    aside = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
    try:
        with aside, console.warnings_as_lines():
            answer = app(arguments or ["--help"], prog_name="logitcache", standalone_mode=False)
    except BrokenPipeError:
        raise
    except Exception as error:
        console.finish()
        code, message = _explain(error, debug="--debug" in arguments)
        _print_errors([message])
        if isinstance(error, Stopped):
            console.write(f"Resume: {_resume_line(arguments)}\n", err=True)
        if as_json:
            _print_json({"error": _error_entry(type(error).__name__, message, code)})
        return code
    # Typer gives a number for --help and --version.
    return _print(answer, as_json) if isinstance(answer, Answer) else int(answer or 0)


def _print(answer: Answer, as_json: bool) -> int:
    if not answer.is_shown:
        return answer.exit_code
    if as_json:
        document = answer.document
        if answer.errors:
            error = _error_entry(answer.error_type, "\n".join(answer.errors), answer.exit_code)
            document = {**document, "error": error}
        _print_json(document)
    else:
        console.write(_text(answer))
    _print_errors(answer.errors)
    return answer.exit_code


def _text(answer: Answer) -> str:
    if answer.text is not None:
        return answer.text
    from logitcache.runtime.tables import as_text

    return as_text(answer.document)


def _explain(error: Exception, debug: bool) -> tuple[int, str]:
    """Choose the exit code and the message; a bug leaves its traceback in a file."""
    if debug:
        console.write(_traceback(error), err=True)
    if isinstance(error, LogitCacheError):
        return error.exit_code, str(error)
    if isinstance(error, UsageError):
        return EXIT_USAGE, _usage_message(error)
    if isinstance(error, OSError) and (fix := _fix_of(error)) is not None:
        return EXIT_USAGE, f"{error.filename or 'the file system'}: {error.strerror}\n  Fix: {fix}"
    summary = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    if debug:
        return EXIT_BUG, f"this is a bug in logitcache or in your own code: {summary}"
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="logitcache-", suffix=".txt", delete=False, encoding="utf-8"
        ) as file:
            file.write(_traceback(error))
    except OSError:  # a full disk may have been the cause
        console.write(_traceback(error), err=True)
        return EXIT_BUG, f"this is a bug: {summary}"
    return EXIT_BUG, f"this is a bug: {summary} (traceback in {file.name}; --debug shows it)"


def _fix_of(error: OSError) -> str | None:
    """Return what to do about an answer of the machine, which is no bug: a full, read-only or forbidden place."""
    from logitcache.store.files import fix_of

    return fix_of(error)


def _traceback(error: Exception) -> str:
    return console.visible("".join(traceback.format_exception(error)))


def _resume_line(arguments: list[str]) -> str:
    """Return the command line that continues where this one stopped."""
    flag = ["--resume"] if arguments[0].startswith("train-") and "--resume" not in arguments else []
    return shlex.join(["logitcache", *arguments, *flag])


def _usage_message(error: Any) -> str:
    """Write what Typer says, with the help to look into: that of the command, where one was named."""
    command = "logitcache" if error.ctx is None else error.ctx.command_path
    return f"{error.format_message()}\n  Fix: see `{command} --help`"


def _print_errors(messages: Sequence[str]) -> None:
    for message in messages:
        console.write(f"Error: {message}\n", err=True)


def _error_entry(kind: str, message: str, code: int) -> dict[str, Any]:
    return {"type": kind, "message": message, "exit_code": code}


def _print_json(document: Any) -> None:
    console.write(f"{json.dumps(_plain(document), indent=2, allow_nan=False)}\n")


def _plain(value: Any) -> Any:
    """Return what JSON can hold: NaN, which it has not, becomes null; numpy's numbers and tensors plain ones."""
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
