"""Embedders: one file per model family. Nothing outside this room knows of pixels, grids or
prompts' tokens."""

from cirloop.backbones.base import EmbedInput, LoraSettings
from cirloop.backbones.config import BackboneConfig, Qwen2VLSettings

__all__ = ["BackboneConfig", "EmbedInput", "LoraSettings", "Qwen2VLSettings"]
EMBEDDERS = {
    "blip2": "cirloop.backbones.blip2:Blip2",
    "clip_combiner": "cirloop.backbones.clip_combiner:ClipCombiner",
    "llava": "cirloop.backbones.llava:Llava",
    "qwen2_vl": "cirloop.backbones.qwen2_vl:Qwen2VL",
    "qwen2_5_vl": "cirloop.backbones.qwen2_5_vl:Qwen25VL",
    "qwen3_vl": "cirloop.backbones.qwen3_vl:Qwen3VL",
}
"""Type of settings -> the embedder, imported when one is built: settings are read without torch."""
