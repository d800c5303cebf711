"""Writes a tiny BLIP-2 retrieval model of the real class, randomly initialised, with its real
processor."""

from __future__ import annotations

import string
from pathlib import Path

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


def model(vocab_size: int, seed: int, text_input: bool = True) -> Blip2ForImageTextRetrieval:
    hidden, image = 32, 28
    config = Blip2Config(
        vision_config=Blip2VisionConfig(
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=image,
            patch_size=7,
            initializer_range=0.02,
        ).to_dict(),
        qformer_config=Blip2QFormerConfig(
            vocab_size=vocab_size,
            hidden_size=hidden,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=64,
            cross_attention_frequency=2,
            encoder_hidden_size=24,
            use_qformer_text_input=text_input,
        ).to_dict(),
        text_config=OPTConfig(
            vocab_size=8,
            hidden_size=8,
            ffn_dim=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            word_embed_proj_dim=8,
        ).to_dict(),
        num_query_tokens=QUERY_TOKENS,
        image_text_hidden_size=16,
    )
    made = Blip2ForImageTextRetrieval(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if (
                "norm" not in name.lower()
            ):  # the class's own start has equal query tokens, and features near nothing
                parameter.normal_(
                    std=1.0 if "token" in name or "embed" in name else 0.2, generator=generator
                )
    return made


def build_tiny_blip2(directory: Path, seed: int = 0, text_input: bool = True) -> Path:
    """Make `directory` a complete model directory, as of the hub; returns it."""
    processor = Blip2Processor(
        BlipImageProcessor(size={"height": 28, "width": 28}),
        tokenizer(),
        num_query_tokens=QUERY_TOKENS,
    )
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
    config = Blip2Config(
        vision_config=Blip2VisionConfig(
            hidden_size=vision,
            intermediate_size=2 * vision,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=image,
            patch_size=patch,
        ).to_dict(),
        qformer_config=Blip2QFormerConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=2 * hidden,
            max_position_embeddings=64,
            cross_attention_frequency=1,
            encoder_hidden_size=vision,
            use_qformer_text_input=True,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ).to_dict(),
        text_config=OPTConfig(
            vocab_size=8,
            hidden_size=8,
            ffn_dim=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            word_embed_proj_dim=8,
        ).to_dict(),
        num_query_tokens=QUERY_TOKENS,
        image_text_hidden_size=hidden // 2,
    )
    made = Blip2ForImageTextRetrieval(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" in name.lower() or parameter.ndim < 2:
                continue
            tower = 0.2 if "vision" in name else parameter.shape[-1] ** -0.5
            parameter.normal_(
                std=0.5 if "token" in name or "embed" in name else tower, generator=generator
            )
    made.save_pretrained(directory)
    size = {"height": image, "width": image}
    Blip2Processor(
        BlipImageProcessor(size=size), tokenizer, num_query_tokens=QUERY_TOKENS
    ).save_pretrained(directory)
    return directory
