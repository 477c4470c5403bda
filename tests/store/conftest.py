"""The sound cache of the tests of caches, for those of stores."""

from tests.cache.conftest import cache, sound

__all__ = ["cache", "sound"]
