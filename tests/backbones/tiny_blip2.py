"""Writes a tiny BLIP-2 retrieval model of the real class, randomly initialised, with its real
processor."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertTokenizer,
    Blip2Config,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipImageProcessor,
    OPTConfig,
)

QUERY_TOKENS = 4


def tokenizer() -> BertTokenizer:
    """BERT's own, whose word pieces are single characters: every ASCII text has tokens."""
    signs = string.digits + string.punctuation
    pieces = [*string.ascii_lowercase, *string.digits]
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *string.ascii_lowercase, *signs]
    vocab = {name: i for i, name in enumerate([*names, *(f"##{piece}" for piece in pieces)])}
    return BertTokenizer(vocab=vocab, bos_token="[DEC]")


NO_LANGUAGE_MODEL = OPTConfig(
    vocab_size=8,
    hidden_size=8,
    ffn_dim=8,
    num_hidden_layers=1,
    num_attention_heads=1,
    word_embed_proj_dim=8,
).to_dict()
"""Its place is taken by the smallest there is."""


def config_of(vision: dict[str, Any], qformer: dict[str, Any], width: int) -> Blip2Config:
    tower = Blip2VisionConfig(
        **vision, intermediate_size=2 * vision["hidden_size"], num_attention_heads=2
    )
    former = Blip2QFormerConfig(
        **qformer,
        intermediate_size=2 * qformer["hidden_size"],
        max_position_embeddings=64,
        encoder_hidden_size=vision["hidden_size"],
    )
    return Blip2Config(
        vision_config=tower.to_dict(),
        qformer_config=former.to_dict(),
        text_config=NO_LANGUAGE_MODEL,
        num_query_tokens=QUERY_TOKENS,
        image_text_hidden_size=width,
    )


def model(vocab_size: int, seed: int, text_input: bool = True) -> Blip2ForImageTextRetrieval:
    tower = {"hidden_size": 24, "num_hidden_layers": 2, "image_size": 28, "patch_size": 7}
    former = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "cross_attention_frequency": 2,
        "use_qformer_text_input": text_input,
    }
    made = Blip2ForImageTextRetrieval(config_of(tower | {"initializer_range": 0.02}, former, 16))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" in name.lower():
                continue
            # the class's own start has equal query tokens, and features near nothing
            std = 1.0 if "token" in name or "embed" in name else 0.2
            parameter.normal_(std=std, generator=generator)
    return made


def build_tiny_blip2(directory: Path, seed: int = 0, text_input: bool = True) -> Path:
    """Make `directory` a complete model directory, as of the hub; returns it."""
    sized = BlipImageProcessor(size={"height": 28, "width": 28})
    processor = Blip2Processor(sized, tokenizer(), num_query_tokens=QUERY_TOKENS)
    model(len(processor.tokenizer), seed, text_input).save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


def save_blip2(
    directory: Path,
    tokenizer: BertTokenizer,
    hidden: int,
    vision: int,
    image: int,
    patch: int,
    seed: int = 0,
) -> Path:
    """A larger one that can learn: Q-Former of two layers and `hidden` dimensions, tower of one
    layer and `vision`."""
    tower = {"hidden_size": vision, "num_hidden_layers": 1, "image_size": image}
    former = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "cross_attention_frequency": 1,
        "use_qformer_text_input": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    config = config_of(tower | {"patch_size": patch}, former, hidden // 2)
    made = Blip2ForImageTextRetrieval(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" in name.lower() or parameter.ndim < 2:
                continue
            std = 0.2 if "vision" in name else parameter.shape[-1] ** -0.5
            std = 0.5 if "token" in name or "embed" in name else std
            parameter.normal_(std=std, generator=generator)
    made.save_pretrained(directory)
    sized = BlipImageProcessor(size={"height": image, "width": image})
    processor = Blip2Processor(sized, tokenizer, num_query_tokens=QUERY_TOKENS)
    processor.save_pretrained(directory)
    return directory
