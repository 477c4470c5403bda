"""Caches that the tests of sweeps share; none of them writes into one."""

from pathlib import Path

import pytest

from tests.student.featured import fill_featured
from tests.student.small import fill


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Float32 logits of one teacher."""
    return fill(tmp_path_factory.mktemp("swept") / "cache")


@pytest.fixture(scope="session")
def featured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Logits and features of one teacher."""
    return fill_featured(tmp_path_factory.mktemp("swept") / "featured")
