"""What a manifest names as teachers."""

from pathlib import Path
from typing import Any

import torch

from hostile_cases.common import DAMAGED, OK, OTHER, READERS, USAGE, Bomb, Case, Prepare, forge
from hostile_cases.datasets import fifo


def model(name: str, entry: Any, plant: Prepare = lambda folder: None) -> Case:
    """Let the manifest name another network for its teacher."""

    def prepare(folder: Path) -> None:
        plant(folder)
        forge(folder, lambda manifest: manifest["teachers"]["t"].update(model=entry))

    ends = {
        "online": (USAGE, DAMAGED, OTHER),
        **dict.fromkeys(READERS[:5], (OK, USAGE, DAMAGED)),
        **dict.fromkeys(("check", "derive"), (OK, USAGE, DAMAGED)),
        # The user's own recipe names a model of the same weights: that of the manifest is not built.
        **dict.fromkeys(("precompute", "plan"), (OK, USAGE, OTHER, DAMAGED)),
    }
    return Case("model", name, prepare, ends, ("online",))


def plant_weights(folder: Path) -> None:
    """Put a malicious torch file where a model may look."""
    torch.save(Bomb(), folder / "evil.pt")
    (folder / "evil").mkdir()
    torch.save(Bomb(), folder / "evil" / "pytorch_model.bin")
    (folder / "evil" / "config.json").write_text('{"architecture": "resnet18", "num_classes": 3}')


def timm_model(name: str, pretrained: bool = False, **options: Any) -> dict[str, Any]:
    """Write the entry of a model of timm."""
    return {"kind": "timm", "name": name, "pretrained": pretrained, "new_head": False, "options": options}


MODELS = [
    model("a factory", {"kind": "custom", "factory": "os:system", "arguments": {"command": "touch PWNED"}}),
    model(
        "timm overlay of a file",
        timm_model("resnet18", True, pretrained_cfg_overlay={"file": "evil.pt"}),
        plant_weights,
    ),
    model("timm weights at a URL", timm_model("resnet18", True, pretrained_cfg={"url": "http://192.0.2.1/w.pt"})),
    model("timm weights of a hub", timm_model("hf-hub:somebody/evil", True)),
    model("timm local folder", timm_model("local-dir:evil", True), plant_weights),
    model("answers in a file", {"kind": "answers", "path": "evil.pt", "whose": "theirs"}, plant_weights),
    model("transformers of a hub", {"kind": "transformers", "path": "hf://somebody/evil"}),
    model("transformers of a local folder", {"kind": "transformers", "path": "evil"}, plant_weights),
    model("timm cache folder", timm_model("resnet18", True, cache_dir="evil"), plant_weights),
    model("timm scriptable", timm_model("resnet18", block_args=[1] * 10**5)),
    model("a checkpoint", {"kind": "checkpoint", "model": {"kind": "small_cnn"}, "path": "evil.pt"}, plant_weights),
    model(
        "a checkpoint that is a pipe", {"kind": "checkpoint", "model": {"kind": "small_cnn"}, "path": "p"}, fifo("p")
    ),
    model("a run elsewhere", {"kind": "run", "path": "/root", "factory": None}),
    model("a run with a factory", {"kind": "run", "path": "teacher", "factory": "os:system"}),
    model("a huge small_cnn", {"kind": "small_cnn", "width": 10**6, "depth": 10}),
    model("a deep small_cnn", {"kind": "small_cnn", "width": 1, "depth": 10**9}),
    model(
        "torchvision weights of a name",
        {"kind": "torchvision", "name": "resnet18", "weights": "../../evil", "new_head": False, "options": {}},
    ),
    model(
        "nested forever", {"kind": "checkpoint", "path": "x", "model": {"kind": "checkpoint", "path": "x", "model": {}}}
    ),
    model("no model", None),
    model("a number", 1e308),
]
