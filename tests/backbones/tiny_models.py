"""Small randomly initialised models of the real classes, with their real processors, written as
model directories.

`write_<family>(directory)` gives the directory. Weights are float32 and drawn wide, so that every
input shows in the output. Tokenizers are the embedded model's byte-level BPE; those of LLaVA have
`<image>`, and a `<s>` in front.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoTokenizer,
    BertConfig,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SiglipVisionConfig,
)

from cirloop.backbones.clip_source import find_checkpoint
from cirloop.backbones.weights import resolve
from tests.backbones import tiny_blip2

STD = 0.08
CHATML = (Path(resolve("tiny", "qwen2_vl")) / "chat_template.jinja").read_text("utf-8")
LLAVA_CHAT = (
    "{% for message in messages %}{{ message['role'].upper() }}: {% for content in"
    " message['content'] %}{% if content['type'] == 'image' %}<image>\n{% else %}{{ content['text']"
    " }}{% endif %}{% endfor %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def _text(**more: Any) -> dict[str, Any]:
    """A language model of width 64; ids are the embedded tokenizer's."""
    return {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 640,
        "max_position_embeddings": 4096,
        "initializer_range": STD,
        "bos_token_id": 573,
        "eos_token_id": 572,
        "pad_token_id": 573,
        **more,
    }


def _save(directory: Path, model_class: Any, config: Any, processor: Any) -> Path:
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():  # what a fresh model has at zero or one would hide mistakes
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


QWEN_TOWER: dict[str, Any] = {
    "depth": 2,
    "num_heads": 2,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "initializer_range": STD,
}
PROJECTED = {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}


def _qwen_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(resolve("tiny", "qwen2_vl"))


QWEN_IDS = {
    "image_token_id": 578,
    "video_token_id": 579,
    "vision_start_token_id": 575,
    "vision_end_token_id": 576,
}


def write_qwen2_vl(directory: Path) -> Path:
    """Patches of 14 pixels; the vision MLP is `fc1`, `fc2`."""
    config = Qwen2VLConfig(
        text_config=_text(rope_parameters=MROPE),
        vision_config={**QWEN_TOWER, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
        tie_word_embeddings=True,
        **QWEN_IDS,
    )
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(), _qwen_tokenizer(), Qwen2VLVideoProcessor(), chat_template=CHATML
    )
    return _save(directory, Qwen2VLForConditionalGeneration, config, processor)


def write_qwen2_5_vl(directory: Path) -> Path:
    """Windowed vision attention; the vision MLP has the language model's names, `gate_proj`,
    `up_proj`, `down_proj`."""
    config = Qwen2_5_VLConfig(
        text_config=_text(rope_parameters=MROPE),
        vision_config={**QWEN_TOWER, **PROJECTED, "window_size": 56, "fullatt_block_indexes": [1]},
        tie_word_embeddings=True,
        **QWEN_IDS,
    )
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(), _qwen_tokenizer(), Qwen2VLVideoProcessor(), chat_template=CHATML
    )
    return _save(directory, Qwen2_5_VLForConditionalGeneration, config, processor)


def write_qwen3_vl(directory: Path) -> Path:
    """Patches of 16 pixels, learned positions, and features of two vision layers for the first two
    language layers."""
    config = Qwen3VLConfig(
        text_config=_text(head_dim=16, rope_parameters=MROPE | {"mrope_interleaved": True}),
        vision_config={
            **QWEN_TOWER,
            **PROJECTED,
            "depth": 3,
            "patch_size": 16,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        tie_word_embeddings=True,
        **QWEN_IDS,
    )
    images = Qwen2VLImageProcessor(patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    processor = Qwen3VLProcessor(
        images, _qwen_tokenizer(), Qwen3VLVideoProcessor(), chat_template=CHATML
    )
    return _save(directory, Qwen3VLForConditionalGeneration, config, processor)


def _llava_tokenizer(*images: str, bos: bool) -> Any:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_qwen_tokenizer().backend_tokenizer,
        eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="right",
    )  # fmt: skip
    tokenizer.add_tokens(list(images), special_tokens=True)
    if bos:
        tokenizer.add_special_tokens({"bos_token": "<s>"})
        front = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
        tokenizer.backend_tokenizer.post_processor = front
    return tokenizer


MISTRAL_CHAT = (
    "<s>{% for message in messages %}[INST] {% for content in message['content'] %}{% if"
    " content['type'] == 'image' %}<image>\n{% else %}{{ content['text'] }}{% endif %}{% endfor %}"
    " [/INST]{% endfor %}"
)
"""Writes its `<s>` itself, which the tokenizer must not do again."""


CLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
    "projection_dim": 32,
    "initializer_range": STD,
}


CLIP_TOKENS: dict[str, Any] = {
    "patch_size": 7,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
}


def write_llava(directory: Path) -> Path:
    """LLaVA-1.5: CLIP on one centre crop, 16 tokens an image, a Llama with `<s>` in front."""
    tokenizer = _llava_tokenizer("<image>", bos=True)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**CLIP), text_config=LlamaConfig(**_text()),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), vision_feature_layer=-2,
        image_seq_length=16, tie_word_embeddings=False,
    )  # fmt: skip
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(images, tokenizer, **CLIP_TOKENS, chat_template=LLAVA_CHAT)
    return _save(directory, LlavaForConditionalGeneration, config, processor)


PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]


def write_llava_next(directory: Path) -> Path:
    """LLaVA-NeXT: the image and its tiles, padding cut off, a newline after each row."""
    tokenizer = _llava_tokenizer("<image>", bos=True)
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**CLIP),
        text_config=LlamaConfig(**_text()),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-2,
        tie_word_embeddings=False,
    )
    images = LlavaNextImageProcessor(
        size={"shortest_edge": 28},
        crop_size={"height": 28, "width": 28},
        image_grid_pinpoints=PINPOINTS,
    )
    processor = LlavaNextProcessor(images, tokenizer, **CLIP_TOKENS, chat_template=MISTRAL_CHAT)
    return _save(directory, LlavaNextForConditionalGeneration, config, processor)


def write_llava_onevision(directory: Path) -> Path:
    """LLaVA-OneVision: SigLIP without a class token, tiles shrunk where there are many, a Qwen2."""
    tokenizer = _llava_tokenizer("<image>", "<video>", bos=False)
    tower = {key: value for key, value in CLIP.items() if key != "projection_dim"}
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**tower, vision_use_head=False),
        text_config=Qwen2Config(**_text()),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_2",
        tie_word_embeddings=False,
    )
    images = LlavaOnevisionImageProcessor(
        size={"height": 28, "width": 28}, image_grid_pinpoints=PINPOINTS
    )
    processor = LlavaOnevisionProcessor(
        images,
        tokenizer,
        LlavaOnevisionVideoProcessor(size={"height": 28, "width": 28}),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_2",
        chat_template=LLAVA_CHAT,
    )
    return _save(directory, LlavaOnevisionForConditionalGeneration, config, processor)


TOWERS: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 32,
        "vision_cfg": {
            "timm_model_name": "test_efficientnet",
            "timm_proj": "none",
            "image_size": 64,
        },
        "text_cfg": {
            "hf_model_name": "text",
            "hf_tokenizer_name": "text",
            "hf_proj_type": None,
            "context_length": 64,
        },
    },
    "preprocess_cfg": {
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.3, 0.4],
        "interpolation": "bilinear",
    },
}
"""Image features have 256 dimensions and text features 32."""


def write_towers(directory: Path) -> Path:
    """A timm network and a BERT as open_clip's towers, without a space in common."""
    tokenizer = tiny_blip2.tokenizer()
    text = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, initializer_range=STD,
    )  # fmt: skip
    text.save_pretrained(directory / "text")
    tokenizer.save_pretrained(directory / "text")
    config = directory / "open_clip_config.json"
    config.write_text(json.dumps(TOWERS))
    clip = find_checkpoint(str(config), "random").build(0)
    save_file(clip.state_dict(), directory / "open_clip_model.safetensors")
    return directory


WRITERS: dict[str, Callable[[Path], Path]] = {
    "qwen2_vl": write_qwen2_vl,
    "qwen2_5_vl": write_qwen2_5_vl,
    "qwen3_vl": write_qwen3_vl,
    "llava": write_llava,
    "llava_next": write_llava_next,
    "llava_onevision": write_llava_onevision,
}
"""Family, and kind of LLaVA -> its writer. The `type` of a configuration is `llava` for the last
three."""
