"""An HTTP service behind a rate limit answers the views, and its answers make the cache."""

import http.server
import io
import json
import runpy
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from logitcache.config.recipe import load_recipe
from logitcache.stage_one.materialize.materialize import materialize
from logitcache.stage_one.precompute import PrecomputeRecipe, precompute
from logitcache.student.training import train
from logitcache.student.training_recipes import StudentRecipe
from tests.cache.made import Linear, recipe, teacher
from tests.stage_one.test_import_targets import KEPT, imported, stored

PIPELINE = Path(__file__).parents[2] / "pipelines/other_frameworks"


class Service(http.server.BaseHTTPRequestHandler):
    """Answers every third request, and asks to wait at the others; ends a connection of the twentieth."""

    asked = answered = 0

    def do_POST(self) -> None:
        picture = self.rfile.read(int(self.headers["Content-Length"]))
        type(self).asked += 1
        if self.asked % 3:
            self.send_response(429)
            self.send_header("Retry-After", "0.001")
            self.end_headers()
            return
        type(self).answered += 1
        pixels = torch.from_numpy(np.moveaxis(np.asarray(Image.open(io.BytesIO(picture))), 2, 0).copy())
        scaled = pixels[None].float().div_(255).sub_(0.5).div_(0.5)
        body = json.dumps({"logits": Linear(16)(scaled)[0].tolist()}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


@pytest.fixture
def url() -> Iterator[str]:
    with http.server.HTTPServer(("127.0.0.1", 0), Service) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()
        thread.join()


def test_a_service_behind_a_rate_limit_answers_and_an_interrupted_run_continues(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = {"kind": "custom", "factory": "tests.cache.made:Pixels", "arguments": {"count": 20}}
    kept = {**KEPT, "dataset": images}
    materialize(recipe(tmp_path / "x.zarr", **kept), tmp_path / "views")
    monkeypatch.setattr("sys.argv", ["ask_a_service.py", url, str(tmp_path / "views"), str(tmp_path / "a.jsonl")])
    runpy.run_path(str(PIPELINE / "ask_a_service.py"), run_name="__main__")
    assert (Service.answered, Service.asked) == (40, 120)
    whole = (tmp_path / "a.jsonl").read_text()
    (tmp_path / "a.jsonl").write_text(whole[: len(whole) // 2])  # a stop in the middle of a line
    runpy.run_path(str(PIPELINE / "ask_a_service.py"), run_name="__main__")
    assert (tmp_path / "a.jsonl").read_text() == whole
    assert 40 < Service.answered < 80
    kept |= {"teachers": {"t": teacher(model=imported(tmp_path / "a.jsonl"))}}
    precompute(recipe(tmp_path / "i.zarr", **kept))
    kept |= {"teachers": {"t": teacher()}}
    precompute(recipe(tmp_path / "o.zarr", **kept), teachers={"t": Linear(16)})
    assert stored(tmp_path / "i.zarr") == stored(tmp_path / "o.zarr")


def test_the_recipes_run_on_answers_of_ones_own(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for number in range(12):
        Image.fromarray(generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(tmp_path / f"photos/{number}.png")
    small = [f"cache={tmp_path}/c.zarr", "num_workers=0", "device=cpu", "batch_size=4"]
    changes = [f"dataset.root={tmp_path}/photos", "views.num_views=2", "views.augmentations.0.size=32", *small]
    changes.append(f"teachers.theirs.model.path={tmp_path}/answers.npz")
    plan = load_recipe(PIPELINE / "precompute.yaml", PrecomputeRecipe, changes)
    materialize(plan, tmp_path / "views", form="npz")
    rows = [np.load(file) for file in sorted((tmp_path / "views").glob("*.npz"))]
    keys, crc32 = (np.concatenate([row[name] for row in rows]) for name in ("key", "crc32"))
    np.savez(tmp_path / "answers.npz", key=keys, crc32=crc32, logits=generator.normal(size=(24, 5)))
    assert precompute(plan).row_views == 24
    shorter = [f"out={tmp_path}/run", "epochs=2", "schedule.warmup_epochs=1", *small]
    assert train(load_recipe(PIPELINE / "student.yaml", StudentRecipe, shorter)).teacher_passes == 0
