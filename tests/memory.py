"""How much memory something takes beside what the process has."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def taking_at_most(limit: int) -> Iterator[None]:
    """Fail if this process comes to take more than `limit` bytes beside what it has.

    Unlike `ru_maxrss`, which hides all that is less than the process ever took, it sees what is freed at once.
    """
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on what the process has
    before = _peak()
    yield
    assert _peak() - before < limit


def _peak() -> int:
    [kilobytes] = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes) << 10
