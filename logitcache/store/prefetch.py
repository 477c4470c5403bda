"""Bring shards while others are in use."""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable

from logitcache.store.arrays import StoredShard

AT_ONCE = 4
"""Shards that are brought at a time."""


class Ahead:
    """A few threads that bring shards, as long as there are any to bring."""

    def __init__(self, bring: Callable[[StoredShard], None]) -> None:
        self._bring = bring
        self._queue: deque[StoredShard] = deque()
        self._threads: list[threading.Thread] = []

    def ask(self, parts: Iterable[StoredShard]) -> None:
        """Bring these, in place of those that were asked for before and are not begun."""
        self._queue = deque(parts)
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        for _ in range(min(len(self._queue), AT_ONCE) - len(self._threads)):
            # They end with the process, whatever they wait for.
            thread = threading.Thread(target=self._run, name="logitcache-ahead", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _run(self) -> None:
        while True:
            try:
                part = self._queue.popleft()
            except IndexError:
                return
            with contextlib.suppress(Exception):  # it is told when the shard is needed
                self._bring(part)
