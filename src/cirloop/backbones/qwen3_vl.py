"""Qwen3-VL (arXiv 2511.21631): a token per 32x32 pixels, and DeepStack (arXiv 2406.04334).

DeepStack adds features of early vision layers to the image tokens after the first layers of the
language model. They are kept with the vision tokens: a row of `ImageFeatures.tokens` has D * (1 +
layers) numbers, the merged token first.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

from cirloop.backbones import qwen2_vl
from cirloop.backbones.base import Inputs, VisionLanguageModel


class VisionMixin(qwen2_vl.VisionMixin):
    """Vision tokens with DeepStack's beside them."""

    @staticmethod
    def language_model_inputs(vlm: VisionLanguageModel, inputs: Inputs) -> Inputs:
        """Return Qwen2-VL's inputs, and DeepStack's features with their places."""
        width = vlm.config.text_config.hidden_size
        parts = inputs["vision_tokens"].split(width, dim=-1)
        merged, *deepstack = (part.contiguous() for part in parts)
        merged_inputs = {**inputs, "vision_tokens": merged}
        return {
            **qwen2_vl.VisionMixin.language_model_inputs(vlm, merged_inputs),
            "visual_pos_masks": inputs["input_ids"] == vlm.config.image_token_id,
            "deepstack_visual_embeds": deepstack,
        }

    def vision_settings(self) -> list[Any]:
        """Return Qwen2-VL's settings, and DeepStack's layers."""
        layers = list(self.vlm.config.vision_config.deepstack_visual_indexes)
        return [*super().vision_settings(), layers]

    def tower_inputs(self, grids: torch.Tensor) -> Inputs:
        """Return Qwen2-VL's, and the places and weights of learned positions."""
        tower = self.vlm.model.visual
        interp_indices, interp_weights = get_vision_interpolation_indices_and_weights(
            grids,
            num_grid_per_side=tower.num_grid_per_side,
            mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners,
            spatial_merge_size=tower.spatial_merge_size,
        )
        learned = {"interp_indices": interp_indices, "interp_weights": interp_weights}
        return super().tower_inputs(grids) | learned

    def token_features(self, output: Any) -> torch.Tensor:
        """Return merged tokens with DeepStack's features beside them."""
        return torch.cat([output.pooler_output, *output.deepstack_features], dim=-1)


class Qwen3VL(VisionMixin, qwen2_vl.QwenEmbedder):
    """The Qwen3-VL embedder."""

    def vision_width(self) -> int:
        """Return how many numbers a vision token has, with DeepStack's."""
        num_layers = len(self.vlm.config.vision_config.deepstack_visual_indexes)
        return super().vision_width() * (1 + num_layers)
