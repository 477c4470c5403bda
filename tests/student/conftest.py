"""Caches that the tests of training share; none of them writes into one."""

from pathlib import Path

import pytest

from tests.student import small


@pytest.fixture(scope="session")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("caches")


@pytest.fixture(scope="session")
def cache(caches: Path) -> Path:
    """Float32 logits of one teacher."""
    return small.fill(caches / "dense")


@pytest.fixture(scope="session")
def two_teachers(caches: Path) -> Path:
    return small.fill(caches / "two", {"first": small.network(1), "second": small.network(2)})


@pytest.fixture(scope="session")
def top_k(caches: Path) -> Path:
    return small.fill(caches / "top_k", logits={"kind": "top_k", "k": 3})


@pytest.fixture(scope="session")
def untouched(caches: Path) -> Path:
    """A cache of images to measure on, as they are."""
    return small.fill(caches / "untouched", views={}, images=small.TEST_IMAGES)


@pytest.fixture(scope="session")
def partly(caches: Path) -> Path:
    """A cache of images of which two in three have no label."""
    return small.fill(caches / "partly", images=small.PARTLY)
