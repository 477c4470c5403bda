import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import logitcache
from logitcache import errors
from logitcache.cli import commands, main
from logitcache.cli.common import CommandResult

COMMANDS = [
    ["demo"],
    ["plan"],
    ["precompute"],
    ["synthesize"],
    ["materialize"],
    ["import-targets"],
    ["derive"],
    ["train-student"],
    ["train-teacher"],
    ["evaluate"],
    ["predict"],
    ["export"],
    ["quantize"],
    ["prune"],
    ["app"],
    ["sweep"],
    ["report"],
    ["log"],
    ["suspects"],
    ["inspect"],
    ["summary"],
    ["verify"],
    ["pair"],
    ["card"],
    ["gc"],
    ["recipe"],
    ["recipe", "check"],
    ["env"],
]
# Typer itself may use pydantic to read arguments.
HEAVY = ("torch", "zarr", "numpy", "yaml", "rich", "torchvision", "dask")


@pytest.fixture(autouse=True)
def _signals():
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    yield
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


@pytest.fixture
def env_raises(monkeypatch):
    """Let `logitcache env` meet an error."""

    def env_raises(error):
        def environment():
            raise error

        monkeypatch.setattr("logitcache.report.environment.environment", environment)

    return env_raises


def run_python(*arguments, **options):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, **options)


EACH_HELP = """
import contextlib, io, json, os, sys
from logitcache.cli import main
for command in json.loads(sys.argv[1]):
    if (child := os.fork()) == 0:
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            code = main([*command, "--help"])
        print(json.dumps([command, code, out.getvalue(), err.getvalue(), sorted(sys.modules)]), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""
"""Shows the help of each command in a process of its own, which has imported no more than the command line."""


@pytest.fixture(scope="module")
def each_help():
    done = run_python("-c", EACH_HELP, json.dumps([[], *COMMANDS]))
    assert (done.returncode, done.stderr) == (0, "")
    return {tuple(command): found for command, *found in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("command", [[], *COMMANDS], ids=" ".join)
def test_help_loads_no_heavy_library(command, each_help):
    code, out, err, modules = each_help[tuple(command)]
    assert code == 0
    assert out.startswith("Usage: logitcache")
    assert err == ""
    assert [name for name in HEAVY if name in modules] == []


def test_importing_the_package_loads_no_heavy_library():
    code = f"import sys, logitcache; print([m for m in {(*HEAVY, 'pydantic')} if m in sys.modules])"
    assert run_python("-c", code).stdout.strip() == "[]"


def test_the_package_runs_as_a_module():
    done = run_python("-m", "logitcache", "--version")
    assert (done.returncode, done.stdout) == (0, f"logitcache {logitcache.__version__}\n")


def test_no_arguments_show_the_help(capsys):
    assert main([]) == 0
    assert "precompute" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["precomputee"], "Did you mean 'precompute'?"),
        (["precompute"], "RECIPE"),
        (["env", "--sett", "a=b"], "--sett"),
        (["train-student", "r.yaml", "--verify", "loose"], "loose"),
        (["recipe"], "Missing command"),
    ],
)
def test_wrong_usage_exits_2_with_one_error(capsys, arguments, expected):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("Error: ")
    assert expected in err


def test_json_is_the_only_thing_on_stdout(capsys, monkeypatch):
    def environment():
        print("a library talks")
        return {"accuracy": float("nan"), "path": Path("a"), "name": "é"}

    monkeypatch.setattr("logitcache.report.environment.environment", environment)
    assert main(["env", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"accuracy": None, "path": "a", "name": "é"}
    assert err == "a library talks\n"


def test_numbers_of_numpy_are_json_numbers(capsys, monkeypatch):
    import numpy as np

    found = {"top1": np.float32(0.5), "count": np.int64(3), "row": np.arange(2)}
    monkeypatch.setattr("logitcache.report.environment.environment", lambda: found)
    assert main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"top1": 0.5, "count": 3, "row": [0, 1]}


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.RecipeError("no"), 2),
        (errors.DataError("no"), 2),
        (errors.MissingExtraError("this", "timm"), 2),
        (errors.CacheError("no"), 3),
        (errors.ReplayMismatchError("no"), 4),
        (errors.Stopped("no", signal.SIGTERM), 75),
        (errors.Stopped("no", signal.SIGINT), 130),
        (OSError(28, "No space left on device", "a.zarr"), 2),
    ],
)
def test_errors_have_their_exit_code_and_a_document(capsys, env_raises, error, code):
    env_raises(error)
    assert main(["env", "--json"]) == code
    out, err = capsys.readouterr()
    document = json.loads(out)["error"]
    assert document["exit_code"] == code
    assert document["type"] == type(error).__name__
    resume = "Resume: logitcache env --json\n" if isinstance(error, errors.Stopped) else ""
    assert err == f"Error: {document['message']}\n{resume}"
    assert main(["env"]) == code
    err = err.replace(" --json", "")
    assert capsys.readouterr() == ("", err)


def test_a_bug_leaves_one_line_and_a_traceback_file(capsys, env_raises):
    env_raises(RuntimeError("broken\nin two lines"))
    assert main(["env"]) == 1
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert "RuntimeError: broken in two lines" in err
    file = Path(re.search(r"traceback in (.*); --debug", err)[1])
    assert "Traceback" in file.read_text()
    file.unlink()


def test_debug_shows_the_traceback(capsys, env_raises):
    env_raises(errors.CacheError("damaged"))
    assert main(["env", "--debug"]) == 3
    assert "Traceback" in capsys.readouterr().err
    env_raises(RuntimeError("broken"))
    assert main(["env", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_outside_the_loops_stops_with_its_code(capsys, monkeypatch, signum, code):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr("logitcache.report.environment.environment", lambda: signal.raise_signal(signum))
    assert main(["env", "--json"]) == code
    out, err = capsys.readouterr()
    assert json.loads(out)["error"]["type"] == "Stopped"
    assert err.startswith("Error: interrupted")
    assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL


@pytest.mark.skipif(os.name != "posix", reason="POSIX pipes")
def test_a_reader_that_leaves_is_no_error():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "logitcache", "env"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_every_public_name_is_listed_in_order_and_has_a_home():
    listed = [name for name in logitcache.__all__ if name != "__version__"]
    assert logitcache.__all__ == sorted(logitcache.__all__)
    assert set(listed) == {*logitcache._HOMES, "losses"}
    assert set(logitcache.__all__) <= set(dir(logitcache))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = logitcache.nothing


@pytest.mark.parametrize("name", logitcache.__all__)
def test_every_public_name_can_be_imported(name):
    assert getattr(logitcache, name) is not None


def test_a_command_with_problems_still_gives_its_document(capsys, monkeypatch):
    answer = CommandResult({"shards": 3}, None, ("shard 1", "shard 2"), "CacheError", 3)
    monkeypatch.setattr("logitcache.cli.app._command", lambda: lambda *args, **kwargs: answer)
    assert main(["verify", "--json"]) == 3
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert document["shards"] == 3
    assert document["error"]["message"] == "shard 1\nshard 2"
    assert err == "Error: shard 1\nError: shard 2\n"


def test_commands_are_those_of_the_help():
    names = {command.name for command in commands.app.registered_commands}
    assert names == {command[0] for command in COMMANDS} - {"recipe"}
