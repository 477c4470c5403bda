"""What peers.py gives every program: images as files, and the weights of the teacher in the form that each reads."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from _peer_programs import CLASSES, SIDE, TEACHER
from PIL import Image, ImageOps


def write_images(folder: Path, counts: Mapping[str, int]) -> None:
    """Write the first bundled images of each class as files, padded to 32 px."""
    source = Path(__file__).parent.parent / "data" / "fashion_mnist"
    for split, file in (("train", "train.npz"), ("validation", "test.npz")):
        with np.load(source / file) as stored:
            pixels, labels = stored["images"], stored["labels"]
        for label in range(CLASSES):
            (folder / split / str(label)).mkdir(parents=True, exist_ok=True)
            for row in np.flatnonzero(labels == label)[: counts[split] // CLASSES]:
                image = ImageOps.expand(Image.fromarray(pixels[row]), (SIDE - pixels.shape[1]) // 2).convert("RGB")
                image.save(folder / split / str(label) / f"{row:05}.png")


def write_weights(folder: Path) -> None:
    """Write the weights of the run in a folder in the form that each program reads."""
    import torch
    from safetensors.torch import load_file

    weights = load_file(folder / "weights.safetensors")
    torch.save(weights, folder / "weights.pt")
    torch.save({"model": weights}, folder / "torchdistill.pt")
    # lightly-train builds a teacher of 1,000 classes and uses its features alone.
    head = {"fc.weight": torch.zeros(1000, weights["fc.weight"].shape[1]), "fc.bias": torch.zeros(1000)}
    torch.save(weights | head, folder / "lightly.pt")
    (folder / "timm").mkdir(exist_ok=True)
    (folder / "timm" / "model.safetensors").write_bytes((folder / "weights.safetensors").read_bytes())
    config = {"architecture": TEACHER, "num_classes": CLASSES, "pretrained_cfg": {"classifier": "fc"}}
    (folder / "timm" / "config.json").write_text(json.dumps(config))
