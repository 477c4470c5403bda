import io
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from logitcache.runtime import console


def test_a_library_is_silent_by_default(capfd):
    console.configure(quiet=True)
    console.logger.info("hello")
    assert list(console.track(range(3), "work", 3)) == [0, 1, 2]
    assert capfd.readouterr() == ("", "")


def test_messages_go_to_stderr_on_one_line_as_they_are(capfd):
    console.configure()
    message = "[bold]view[/bold] " + "long " * 60 + ":smile: 3"
    console.logger.info(message)
    console.logger.debug("only when verbose")
    console.configure(verbose=True)
    console.logger.debug("shown")
    assert capfd.readouterr() == ("", f"{message}\nshown\n")


def test_a_log_gets_a_line_every_few_seconds(capfd, monkeypatch):
    clock = iter(range(0, 1000, 3))
    # Not of the module that other threads have too.
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    console.configure()
    assert list(console.track(range(6), "precompute", 8, "shards", done=2)) == list(range(6))
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "precompute: 4/8 shards (50 %), 0.333 shards/s, 12 s left",
        "precompute: 6/8 shards (75 %), 0.333 shards/s, 6 s left",
        "precompute: 8/8 shards in 21 s",
    ]


def test_quick_work_leaves_no_line_in_a_log(capfd):
    console.configure()
    assert list(console.track(range(3), "work", 3)) == [0, 1, 2]
    assert list(console.track([], "nothing", 0)) == []
    assert capfd.readouterr().err == ""


@pytest.fixture
def terminal(monkeypatch):
    """A console that takes itself for a terminal."""
    console.configure()
    file = io.StringIO()
    monkeypatch.setattr(console._output, "console", Console(file=file, force_terminal=True, width=100))
    return file


def test_bars_within_bars_share_the_terminal(terminal):
    for _ in console.track(range(2), "epochs", 2):
        for _ in console.track(range(2), "batches", 2):
            console.logger.info("still readable")
    assert console._output.progress is None
    assert terminal.getvalue().count("still readable") == 4


def test_a_bar_ends_with_the_error_that_ends_the_work(terminal):
    def work():
        for _ in console.track(range(2), "work", 2):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        work()
    console.finish()
    assert console._output.progress is None


def test_a_caller_routes_messages_by_the_package_s_logger(capfd):
    code = (
        "import logging, sys; from logitcache.runtime.console import logger\n"
        "logger.info('unheard')\n"
        "logging.basicConfig(level=logging.INFO, format='%(name)s|%(message)s', stream=sys.stdout)\n"
        "logger.info('100 %s [b]'); logger.debug('unheard')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert capfd.readouterr() == ("logitcache|100 %s [b]\n", "")


def test_each_line_is_shown_once_whatever_else_listens(capfd):
    heard = logging.StreamHandler()
    logging.getLogger().addHandler(heard)
    try:
        console.configure()
        console.logger.info("once")
        with console.silenced():
            console.logger.info("never")
    finally:
        logging.getLogger().removeHandler(heard)
    assert capfd.readouterr() == ("", "once\n")


@pytest.mark.parametrize("hostile", ["\x1b[2J", "\ud800", "\u202e"], ids=ascii)
def test_handlers_of_a_caller_get_messages_that_any_file_and_terminal_takes(hostile: str, tmp_path: Path) -> None:
    handler = logging.FileHandler(tmp_path / "log", encoding="utf-8")
    console.logger.addHandler(handler)
    try:
        console.logger.warning("before%safter", hostile)
    finally:
        console.logger.removeHandler(handler)
        handler.close()
    escaped = hostile.encode("unicode_escape").decode()
    assert (tmp_path / "log").read_text() == f"before{escaped}after\n"
