"""Tiny models of transformers on disk, as save_pretrained writes them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="models of Hugging Face need the extra hf")

VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}
_TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
    "eos_token_id": 1,
    "bos_token_id": 0,
    "pad_token_id": 1,
}
WORDS = ("<s>", "</s>", "<unk>", "a", "photo", "of", "the", "drawing", ".", "cat", "dog", "fish")


def write_classifier(folder: Path, num_labels: int = 3, processor: dict[str, Any] | None = None) -> torch.nn.Module:
    """Write a ViT of random weights with its processor; return it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.ViTForImageClassification(transformers.ViTConfig(**VIT, num_labels=num_labels))
    written = {"size": {"height": 32, "width": 32}, "image_mean": [0.4, 0.5, 0.6], **(processor or {})}
    return _written(folder, model, transformers.ViTImageProcessor(**written))


def write_clip(folder: Path) -> torch.nn.Module:
    """Write a CLIP of random weights, with its processor and a tokenizer of few words; return it."""
    text = transformers.CLIPTextConfig(**_TEXT, vocab_size=len(WORDS))
    vision = transformers.CLIPVisionConfig(**VIT)
    config = transformers.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.CLIPModel(config)
    _write_tokenizer(folder)
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return _written(folder, model, processor)


def write_siglip(folder: Path) -> torch.nn.Module:
    """Write a SigLIP of random weights, scale and bias, with its processor and tokenizer; return it."""
    text = transformers.SiglipTextConfig(**_TEXT, vocab_size=len(WORDS), projection_size=16)
    vision = transformers.SiglipVisionConfig(**VIT)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.SiglipModel(
            transformers.SiglipConfig(text_config=text.to_dict(), vision_config=vision.to_dict())
        )
        model.logit_scale.data.fill_(2.5)
        model.logit_bias.data.fill_(-3.25)
    _write_tokenizer(folder)
    return _written(folder, model, transformers.SiglipImageProcessor(size={"height": 32, "width": 32}))


def _written(folder: Path, model: Any, processor: Any) -> torch.nn.Module:
    transformers.utils.logging.disable_progress_bar()
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    found: torch.nn.Module = model
    return found


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    fast.save_pretrained(folder)


def change_json(file: Path, **changes: Any) -> None:
    """Change entries of a JSON file; None removes one."""
    found = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: value for name, value in found.items() if value is not None}))
