"""Qwen2.5-VL (arXiv 2502.13923): Qwen2-VL with windowed attention in the vision tower.

The tower's MLP has the names of the language model's (`gate_proj`, `up_proj`, `down_proj`), so that
a LoRA by those names alone would reach it. So `lora_modules` names the language model too, and
`VlmEmbedder` checks where the LoRA is.
"""

from __future__ import annotations

from typing import Any

from cirloop.backbones import qwen2_vl


class VisionMixin(qwen2_vl.VisionMixin):
    """Vision of Qwen2-VL with windows, which are settings that no weight shows."""

    def vision_settings(self) -> list[Any]:
        """Return Qwen2-VL's settings, and those of windowed attention."""
        vision = self.vlm.config.vision_config
        return [*super().vision_settings(), vision.window_size, list(vision.fullatt_block_indexes)]


class Qwen25VL(VisionMixin, qwen2_vl.QwenEmbedder):
    """The Qwen2.5-VL embedder."""
