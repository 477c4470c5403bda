"""A trained run and its exported file, made once: an export takes seconds."""

from pathlib import Path

import pytest

from logitcache.student.training import train
from tests.student.small import TEST_IMAGES, fill, student


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("shipping") / "c.zarr")


@pytest.fixture(scope="session")
def run(cache: Path) -> Path:
    out = cache.parent / "run"
    train(student(out, cache, epochs=2, ema=0.9, validation={"dataset": TEST_IMAGES}))
    return out


@pytest.fixture(scope="session")
def file(run: Path) -> Path:
    """The run as ONNX, of uint8 pixels."""
    pytest.importorskip("onnxscript", reason="exports need the extra export")
    from logitcache.shipping.export import export

    return Path(export(run, run.parent / "model.onnx").file)
