"""Losses that differentiate within a student run its attention by the math kernel: fused ones differentiate once."""

import json

import pytest
import torch
from torch import nn

from logitcache.models import Classifier, Preprocessing
from logitcache.reductions import FeatureShape
from logitcache.student.learner import Learner
from logitcache.student.losses.base import HeldTeacher, Site
from logitcache.student.optim.schedules import Progress
from logitcache.student.training_recipes import StudentRecipe
from logitcache.targets import Batch, Targets

timm = pytest.importorskip("timm")
HALF = (0.5,) * 3
ENTRY = {
    "out": "run",
    "cache": "cache",
    "model": {"kind": "timm", "name": "vit_tiny_patch16_224"},
    "losses": [{"kind": "grad_cam", "student": "blocks.0", "feature": "map"}],
    "epochs": 1,
}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 3])
def test_grad_cam_trains_a_vision_transformer_of_timm(precision: str, rows: int) -> None:
    torch.manual_seed(0)
    network: nn.Module = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=4)
    recipe = StudentRecipe.model_validate_json(json.dumps(ENTRY | {"precision": precision}))
    site = Site({"blocks.0": (5, 192)}, {"t": HeldTeacher(4, {"map": FeatureShape("grad_cam", (2, 2))})}, rows)
    adapters = nn.ModuleList([recipe.losses[0].adapter(site)])
    classifier = Classifier(network, Preprocessing(mean=HALF, std=HALF))
    learner = Learner(recipe, classifier, torch.device("cpu"), adapters)
    targets = Targets(torch.randn(rows, 4), {"map": torch.rand(rows, 2, 2)})
    pixels = torch.randint(0, 256, (rows, 3, 32, 32), dtype=torch.uint8)
    learner.trained.train()
    batch = Batch(pixels, torch.arange(rows), torch.zeros(rows, 2), {"t": targets})
    learner.terms(batch, Progress(0, 1, 1)).sum().backward()
    gradient = network.get_submodule("blocks.0.attn.qkv").get_parameter("weight").grad
    assert gradient is not None
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0
