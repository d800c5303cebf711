"""Qwen2.5-VL (arXiv 2502.13923): Qwen2-VL with windowed attention in the vision tower.

The tower's MLP has the names of the language model's (`gate_proj`, `up_proj`, `down_proj`), so that
a LoRA by those names alone would reach it. So `lora_modules` names the language model too, and
`VlmEmbedder` checks where the LoRA is.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.vision_utils import get_vision_window_index

from cirloop.backbones import qwen2_vl
from cirloop.backbones.base import Inputs


class VisionMixin(qwen2_vl.VisionMixin):
    """Vision of Qwen2-VL with windows, which are settings that no weight shows."""

    def vision_settings(self) -> list[Any]:
        """Return Qwen2-VL's settings, and those of windowed attention."""
        vision = self.vlm.config.vision_config
        return [*super().vision_settings(), vision.window_size, list(vision.fullatt_block_indexes)]

    def tower_inputs(self, grids: torch.Tensor) -> Inputs:
        """Return Qwen2-VL's, and those of windows."""
        tower = self.vlm.model.visual
        sizes = (tower.spatial_merge_size, tower.window_size, tower.patch_size)
        window_index, cu_window_seqlens = get_vision_window_index(grids, *sizes)
        windows = {"window_index": window_index, "cu_window_seqlens": cu_window_seqlens}
        return super().tower_inputs(grids) | windows


class Qwen25VL(VisionMixin, qwen2_vl.QwenEmbedder):
    """The Qwen2.5-VL embedder."""
