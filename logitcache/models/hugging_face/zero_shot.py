"""Zero-shot classifiers: the text tower of CLIP or SigLIP answers once, and its matrix is the head of the image tower.

Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021 (arXiv:2103.00020), section
3.1.4: the embeddings of several prompts of a class, each of unit length, are averaged, and the mean has unit length.
Zhai et al., Sigmoid Loss for Language Image Pre-Training, 2023 (arXiv:2303.15343): logits have a bias too.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from logitcache.errors import RecipeError
from logitcache.models.hugging_face.folder import library
from logitcache.runtime.console import track

_BATCH = 64
_STEP = 2.0**-20
"""Embeddings of text are multiples of it: machines whose last bits differ build one and the same head."""


class ZeroShot(nn.Module):
    """Normalised float [B, 3, H, W] to logits [B, K]: `head` takes the embedding of an image, of unit length."""

    def __init__(self, tower: nn.Module, projection: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.tower, self.projection, self.head = tower, projection, head

    def forward(self, images: Tensor) -> Tensor:
        """Compare images with the labels."""
        embedding = self.projection(self.tower(images).pooler_output)
        logits: Tensor = self.head(functional.normalize(embedding, dim=-1))
        return logits


def zero_shot_classifier(
    load: Callable[[], Any], kind: str, folder: Path, labels: Sequence[str], templates: Sequence[str]
) -> ZeroShot:
    """Build the classifier of labels of a loaded model of a kind; the text tower is left behind.

    Raises RecipeError for kinds other than CLIP and SigLIP.
    """
    if kind not in ("clip", "siglip"):
        raise RecipeError(
            f"'{folder}' is of type {kind!r}, which compares no images with text as CLIP and SigLIP do.\n"
            "  Fix: a model of type clip or siglip, or another `task:`"
        )
    model = load().eval()
    text = label_embeddings(model, folder, labels, templates)
    # SigLIP's towers end in embeddings: it has no projection, and no bias in CLIP.
    projection = model.visual_projection if kind == "clip" else nn.Identity()
    bias = model.logit_bias.detach() if kind == "siglip" else None
    head = nn.Linear(text.shape[1], len(labels), bias=bias is not None)
    with torch.no_grad():
        head.weight.copy_(text * model.logit_scale.detach().double().exp())
        if bias is not None:
            head.bias.copy_(bias.expand(len(labels)))
    return ZeroShot(model.vision_model, projection, head)


@torch.no_grad()
def label_embeddings(model: Any, folder: Path, labels: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Return an embedding of unit length for each label, float64 [K, D], of all templates."""
    tokenizer = library().AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    length = model.config.text_config.max_position_embeddings
    # SigLIP was trained on text of full length, CLIP masks what is padded.
    padding = "max_length" if model.config.model_type == "siglip" else True
    prompts = [template.replace("{}", label) for label in labels for template in templates]
    model.double()
    found = []
    for start in track(range(0, len(prompts), _BATCH), "reading labels", -(-len(prompts) // _BATCH), unit="batches"):
        batch = prompts[start : start + _BATCH]
        tokens = tokenizer(batch, padding=padding, truncation=True, max_length=length, return_tensors="pt")
        taken = {name: tokens[name] for name in ("input_ids", "attention_mask") if name in tokens}
        if model.config.model_type == "siglip":
            taken.pop("attention_mask", None)
        found.append(model.get_text_features(**taken).pooler_output)
    model.float()
    every = functional.normalize(torch.cat(found), dim=-1).view(len(labels), len(templates), -1)
    mean = functional.normalize(every.mean(dim=1), dim=-1)
    return (mean / _STEP).round() * _STEP
