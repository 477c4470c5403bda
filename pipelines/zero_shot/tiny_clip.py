"""Write a CLIP of random weights, to try the steps of this folder: python tiny_clip.py FOLDER [WORD …].

It knows the words of the command line and those of the templates, one token each, and answers at random.
"""

import sys

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast

WORDS = ["<s>", "</s>", "<unk>", "a", "photo", "drawing", "of", "the", "."]
WIDTH, SIZE = 32, 32


def write_tokenizer(folder: str, words: list[str]) -> None:
    """Write a tokenizer that gives each word a number."""
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def write_model(folder: str, num_words: int) -> None:
    """Write both towers, and the processor of their images."""
    tower = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tower, "vocab_size": num_words, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1}
    vision = {**tower, "image_size": SIZE, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    size = {"height": SIZE, "width": SIZE}
    CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=size).save_pretrained(folder)


if __name__ == "__main__":
    folder, *labels = sys.argv[1:]
    words = list(dict.fromkeys([*WORDS, *(labels or ["cat", "dog", "fish"])]))
    write_tokenizer(folder, words)
    write_model(folder, len(words))
