"""A process that opens caches and reads views of them on command: a program, for the tests of several processes.

    python -m tests.cache.reading

Reads lines of JSON on its stdin, ["open", PATH] or ["read", PATH, VIEW], and prints a line for each: the number of
views, or the digest of all rows of the view in every array of the cache that was opened; null if it is refused.
"""

import hashlib
import json
import sys

from logitcache.cache.cache import Cache, open_cache
from logitcache.errors import LogitCacheError
from logitcache.views.keys import ViewKey
from tests.cache.made import raw


class Reader:
    """The caches that a process has open, by their location."""

    def __init__(self) -> None:
        self._opened: dict[str, Cache] = {}

    def open(self, path: str) -> int | None:
        """Open a cache, or again; returns its views."""
        self._opened.pop(path, None)
        try:
            self._opened[path] = open_cache(path)
        except LogitCacheError:
            return None
        return self._opened[path].num_views

    def read(self, path: str, view: int) -> str | None:
        """Return the digest of the rows of a view."""
        cache, digest = self._opened[path], hashlib.sha256()
        try:
            answers = cache.rows([ViewKey(view, index) for index in range(len(cache))])
            for name in sorted(answers):
                for values in raw(answers[name].compact):
                    digest.update(values.tobytes())
        except LogitCacheError:
            return None
        return digest.hexdigest()


def main() -> None:
    reader = Reader()
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        print(json.dumps(getattr(reader, command)(*arguments)), flush=True)


if __name__ == "__main__":
    main()
