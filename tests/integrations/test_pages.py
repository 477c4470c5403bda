"""The pages on loops of one's own: each runs as it is written, and its losses are those of the formula."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from logitcache.cache.cache import open_cache
from logitcache.config.recipe import load_recipe
from logitcache.stage_one.precompute import PrecomputeRecipe, precompute

ROOT = Path(__file__).parents[2]
LOOPS = ROOT / "docs/how-to/loops"
CACHE = "caches/fashion_mnist/train.zarr"
EPOCHS, TEMPERATURE = 2, 2.0
NEEDS = {"plain-pytorch": "torch", "lightning": "lightning", "accelerate": "accelerate", "timm": "timm"}
# What is no extra of the core is run by `make test-integrations`.
pytestmark = pytest.mark.integration


def code_of(page: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", (LOOPS / f"{page}.md").read_text(), re.DOTALL)
    return code


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with the cache that the pages open: 100 images, of two views."""
    found = tmp_path_factory.mktemp("pages")
    changes = [f"cache={found / CACHE}", "dataset.num_images=100", "views.num_views=2", "num_workers=0"]
    precompute(load_recipe(ROOT / "pipelines/fashion_mnist/precompute.yaml", PrecomputeRecipe, changes))
    return found


def rows(folder: Path) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield epoch, images in 0..1 and the teacher's probabilities at the temperature, batch by batch."""
    loader = open_cache(folder / CACHE).loader(batch_size=64)
    for epoch in range(EPOCHS):
        for batch in loader.epoch(epoch):
            yield epoch, batch.images / 255, (batch.targets.logits / TEMPERATURE).softmax(1)


def formula(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """T² Σ p log(p / q), the mean over rows, written out."""
    q = (student / TEMPERATURE).exp()
    q = q / q.sum(1, keepdim=True)
    return TEMPERATURE**2 * (teacher * (teacher / q).log()).sum(1).mean()


def expected(folder: Path, student: nn.Module, lr: list[float], **options: Any) -> list[float]:
    """Train by the formula with SGD, at a learning rate for each epoch."""
    decay = options.pop("weight_decay", 0.0)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in student.parameters() if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in student.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=lr[0], **options)
    losses = []
    for epoch, images, teacher in rows(folder):
        for group in optimizer.param_groups:
            group["lr"] = lr[epoch]
        loss = formula(student(images), teacher)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("page", NEEDS)
def test_a_page_takes_the_steps_of_the_formula(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(NEEDS[page], exc_type=ImportError)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    found: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(code_of(page), page, "exec"), found)
    torch.manual_seed(0)
    if page == "timm":
        student = pytest.importorskip("timm").create_model("test_resnet", num_classes=10, in_chans=1)
        wanted = expected(folder, student, [0.05, 0.025], momentum=0.9, nesterov=True, weight_decay=1e-4)
    else:
        wanted = expected(folder, nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), [0.05, 0.05])
    # Batch normalisation in many layers amplifies rounding, which is another with each number of threads.
    bound = {"rel": 1e-4} if page == "timm" else {"abs": 1e-5}
    assert found["losses"] == pytest.approx(wanted, **bound)


# A process for each backend: Keras takes one for its life.
KERAS = """
import json, sys
import numpy as np
import torch
import logitcache as lc

found = {"__name__": "__main__"}
exec(compile(sys.stdin.read(), "keras.md", "exec"), found)
model, batch = found["model"], next(iter(found["loader"].epoch(0)))
images = batch.images.permute(0, 2, 3, 1).numpy().astype("float32") / 255
targets = found["keras"].ops.convert_to_tensor(batch.targets.log_probs(2.0).numpy())
logits = found["keras"].ops.convert_to_numpy(model(images))
theirs = float(model.compute_loss(images, targets, model(images)))
ours = float(lc.losses.kl_divergence(torch.tensor(np.array(logits)), batch.targets, 2.0))
kernel, bias = (found["keras"].ops.convert_to_numpy(value) for value in found["build"]().student.weights)
weights = {"kernel": kernel.tolist(), "bias": bias.tolist()}
backend = found["keras"].backend.backend()
print(json.dumps({"backend": backend, "theirs": theirs, "ours": ours, "losses": found["losses"], **weights}))
"""


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_keras_has_our_loss_and_takes_the_steps_of_the_formula(backend: str, folder: Path) -> None:
    # Importing Keras here would choose a backend.
    if not (importlib.util.find_spec("keras") and importlib.util.find_spec(backend)):
        pytest.skip(f"keras or {backend} is not installed")
    environment = os.environ | {"KERAS_BACKEND": backend, "CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", KERAS],
        input=code_of("keras"),
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["backend"] == backend
    assert found["theirs"] == pytest.approx(found["ours"], abs=1e-5)
    student = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    layer = student[1]
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(found["kernel"]).T)
        layer.bias.copy_(torch.tensor(found["bias"]))
    steps = expected(folder, student, [0.05, 0.05])
    sizes = [len(images) for _, images, _ in rows(folder)]
    half = len(steps) // EPOCHS
    means = [np.average(steps[at : at + half], weights=sizes[at : at + half]) for at in (0, half)]
    assert found["losses"] == pytest.approx(means, abs=1e-5)
