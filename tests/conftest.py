"""What every test needs: no network, no file of the user's, the same numbers every time."""

import gc
import logging
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Before anything imports a library that reads them once.
_HOME = tempfile.TemporaryDirectory(prefix="logitcache-")
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers have the folder of the process that starts them
    # What killed processes leave goes with it, but not the folders of tests that failed.
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
    os.environ["TMPDIR"], tempfile.tempdir = _HOME.name, None
for _variable, _folder in {
    "HOME": "",
    "XDG_CACHE_HOME": ".cache",
    "XDG_CONFIG_HOME": ".config",
    "XDG_DATA_HOME": ".data",
    "TORCH_HOME": ".cache/torch",
    "HF_HOME": ".cache/huggingface",
}.items():
    os.environ[_variable] = str(Path(_HOME.name, _folder))
os.environ |= {"HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "COLUMNS": "120"}
os.environ["LOGITCACHE_SHARED_MEMORY"] = "0"  # or the same shards of different tests would be decoded once
os.environ["OMP_WAIT_POLICY"] = "passive"  # or threads that wait keep their cores busy
os.environ.pop("FORCE_COLOR", None)
# Or each of the many interpreters that tests start would compile the package.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

# `configure` itself: tests put others in its place. Functions import torch: the process that starts workers runs no
# test, and they would wait for the seconds that this takes.
from logitcache.runtime.console import _output, configure, logger  # noqa: E402
from tests.warm import start_server  # noqa: E402

os.fsync = lambda descriptor: None  # the power does not fail in a test, and disks take their time

settings.register_profile("same", derandomize=True, database=None, deadline=None)
settings.load_profile("same")


ROOT = Path(__file__).parents[1]


def pytest_configure(config: pytest.Config) -> None:
    """Have xdist take files in the order of the items, not those of most tests first."""
    if config.pluginmanager.hasplugin("xdist"):
        config.option.loadscopereorder = False


WARM = ("program", "stopped", "Program", "start_server")
"""Names in a module whose tests start processes of `tests.warm`."""


def _starts_processes(item: pytest.Item) -> bool:
    """Return whether the file of a test has what starts processes."""
    names = vars(getattr(item, "module", None) or object)
    return any(name in names for name in (*WARM, "subprocess", "multiprocessing"))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that start processes, which take longest; skip tests of a device that is not there."""
    import torch

    items.sort(key=_starts_processes, reverse=True)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Keep what was imported and collected out of later garbage collections: a million objects. Collect less often.

    Start the server of warm processes before a loader starts one that has imported less.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)  # tests make many objects and few cycles: a twentieth of their time
    if any(name in vars(getattr(item, "module", None) or object) for item in session.items for name in WARM):
        start_server()


@pytest.fixture(scope="session", autouse=True)
def _checkout_as_it_was() -> Iterator[None]:
    """Fail if tests leave something at the top of the checkout, but for the caches of tools."""
    before = set(os.listdir(ROOT))
    yield
    left = [name for name in os.listdir(ROOT) if name not in before and not name.startswith((".", "__"))]
    assert left == [], "a test worked in the checkout and not in a folder of its own"


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Compute with one thread: arrays are small, and float32 sums depend on how many there are."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def warm_workers() -> Iterator[None]:
    """Have Dask fork the workers of this machine from the server of warm processes; they get no variables of a test."""
    import dask

    start_server()
    with dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}):
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Seed torch's generator; tests that must not depend on it reseed it themselves."""
    import torch

    torch.default_generator.manual_seed(0)  # torch.manual_seed formats three stacks where there is no GPU
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(0)


@pytest.fixture(autouse=True)
def _silent_again() -> Iterator[None]:
    """Show no progress after a test that had a command show some."""
    yield
    # Else not: that a level is set is told to every logger there is.
    if logger.propagate or logger.level != logging.INFO or _output.console or _output.progress:
        configure(quiet=True)


class Logged(logging.Handler):
    """What the package logs, with as much of the interface of pytest's own as tests use."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self.clear = self.records.clear

    def emit(self, record: logging.LogRecord) -> None:
        record.message = record.getMessage()
        self.records.append(record)

    @property
    def text(self) -> str:
        return "\n".join(record.message for record in self.records)


@pytest.fixture
def caplog() -> Iterator[Logged]:
    """Note what the package logs; pytest's plugin, in its place, costs each test what a small one takes."""
    logger.addHandler(handler := Logged())
    yield handler
    logger.removeHandler(handler)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse every connection off this machine: a test that needs one is not a test of ours."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: object) -> None:
        host = address[0] if isinstance(address, tuple) else "localhost"
        if host not in ("localhost", "127.0.0.1", "::1"):
            raise ConnectionRefusedError(f"tests may not connect to {host}")
        connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", local_only)
