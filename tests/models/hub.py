"""Pretrained weights on disk, where timm and torchvision look for what they have downloaded."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from logitcache.models import Torchvision


def keep_timm_weights(folder: Path, name: str, patch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Write random weights of a model below a folder, which becomes the hub's cache; return them."""
    patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config: Any = timm.get_pretrained_cfg(name)
    state = _state(timm.create_model(name, num_classes=config.num_classes))
    repository = folder / f"models--{config.hf_hub_id.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True, exist_ok=True)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs/main").write_text("0" * 40)
    save_file(state, snapshot / "model.safetensors")
    return state


def keep_torchvision_weights(folder: Path, name: str, patch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Write random weights of a model below a folder, which becomes TORCH_HOME; return them."""
    from torchvision.models import get_model_weights

    patch.setenv("TORCH_HOME", str(folder))
    state = _state(Torchvision(name=name, weights=None).build(1000, 3).module)
    file = folder / "hub/checkpoints" / get_model_weights(name)["DEFAULT"].url.rpartition("/")[2]
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, file)
    return state


def _state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}
