"""Embedders: one file per model family. Nothing outside this room knows of pixels, grids or
prompts' tokens."""

from cirloop.backbones.base import EmbedInput, LoraSettings
from cirloop.backbones.config import BackboneConfig, Qwen2VLSettings

__all__ = ["BackboneConfig", "EmbedInput", "LoraSettings", "Qwen2VLSettings"]
