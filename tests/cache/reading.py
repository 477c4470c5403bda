"""A process that opens caches and reads views of them on command, for the tests of several processes."""

import hashlib
import os
from collections.abc import Mapping
from multiprocessing.connection import Connection

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


def serve(questions: Connection, environment: Mapping[str, str]) -> None:
    """Answer ("open", PATH) by the number of views, ("read", PATH, VIEW) by a digest; both by None if it is refused."""
    os.environ |= environment
    reader = Reader()
    while question := questions.recv():
        command, *arguments = question
        questions.send(getattr(reader, command)(*arguments))
