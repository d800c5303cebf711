"""Qwen3-VL (arXiv 2511.21631): 32x32 pixels a token, and DeepStack (arXiv 2406.04334).

DeepStack adds features of early vision layers to the image places after the first layers of the
language model. They are kept with the vision tokens: a row of `VisionInput.tokens` is (D * (1 +
layers)), the merged token first.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from cirloop.backbones import qwen2_vl
from cirloop.backbones.vision import Inputs


class VisionMixin(qwen2_vl.VisionMixin):
    """Vision tokens with DeepStack's beside them."""

    @staticmethod
    def place(vlm: Any, inputs: Inputs, sequential: bool = False) -> Inputs:
        width = vlm.config.text_config.hidden_size
        merged, *deep = (part.contiguous() for part in inputs["vision_tokens"].split(width, dim=-1))
        embeds, positions = qwen2_vl.place_vision(
            vlm, {**inputs, "vision_tokens": merged}, sequential
        )
        return {
            "inputs_embeds": embeds,
            "attention_mask": inputs["attention_mask"],
            "position_ids": positions,
            "visual_pos_masks": inputs["input_ids"] == vlm.config.image_token_id,
            "deepstack_visual_embeds": deep,
        }

    def vision_settings(self) -> list[Any]:
        return [
            *super().vision_settings(),
            list(self.vlm.config.vision_config.deepstack_visual_indexes),
        ]

    def features(self, out: Any) -> torch.Tensor:
        return torch.cat([out.pooler_output, *out.deepstack_features], dim=-1)


class Qwen3VL(VisionMixin, qwen2_vl.QwenEmbedder):
    """The Qwen3-VL embedder."""

    types: ClassVar[tuple[str, ...]] = ("qwen3_vl",)

    def vision_width(self) -> int:
        return super().vision_width() * (
            1 + len(self.vlm.config.vision_config.deepstack_visual_indexes)
        )
