"""A Keras model answers written views, and its answers make a cache."""

import os
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from logitcache.cache.cache import open_cache
from logitcache.stage_one.materialize.materialize import materialize
from logitcache.stage_one.precompute import precompute
from logitcache.views.keys import ViewKey
from tests.cache.made import DENSE32, recipe, teacher
from tests.stage_one.test_import_targets import KEPT, imported

os.environ.setdefault("KERAS_BACKEND", "torch")  # else TensorFlow, which is not installed
keras = pytest.importorskip("keras", exc_type=ImportError)
pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
PIPELINE = Path(__file__).parents[2] / "pipelines/other_frameworks"


def test_a_keras_teacher_answers_the_views_and_its_answers_are_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((4, 4, 3)), keras.layers.Rescaling(1 / 255), keras.layers.Flatten(), keras.layers.Dense(7)]
    )
    model.save(tmp_path / "teacher.keras")
    materialize(recipe(tmp_path / "c.zarr", **KEPT), tmp_path / "views", form="npz")
    arguments = [str(tmp_path / name) for name in ("teacher.keras", "views", "answers")]
    monkeypatch.setattr("sys.argv", ["answer_with_keras.py", *arguments])
    runpy.run_path(str(PIPELINE / "answer_with_keras.py"), run_name="__main__")
    kept = {**KEPT, "teachers": {"t": teacher(DENSE32, model=imported(tmp_path / "answers"))}}
    precompute(recipe(tmp_path / "c.zarr", **kept))
    rows = np.load(next(iter(sorted((tmp_path / "views").glob("*.npz")))))
    keys = [ViewKey(*map(int, key.split("/"))) for key in rows["key"][:30]]
    expected = model(np.moveaxis(rows["pixels"][:30], 1, 3).astype(np.float32))
    found = open_cache(tmp_path / "c.zarr").answers(keys)["t"].logits
    torch.testing.assert_close(
        found, torch.from_numpy(np.array(keras.ops.convert_to_numpy(expected))), atol=1e-5, rtol=0
    )
