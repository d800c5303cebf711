"""Qwen2-VL (arXiv 2409.12191): images of any size, 28x28 pixels a token, positions in three
dimensions (M-RoPE)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from qwen_vl_utils import fetch_image, smart_resize
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize as keeping_a_token

from cirloop.backbones import patches
from cirloop.backbones.base import Grid, VisionInput
from cirloop.backbones.vision import Inputs, VisionBase, embed_with, load_vlm
from cirloop.backbones.vlm import VlmEmbedder

if TYPE_CHECKING:
    from PIL import Image

    from cirloop.backbones.model_settings import QwenSettings

__all__ = ["IMAGE", "Qwen2VL", "QwenEmbedder", "VisionMixin", "load_vlm", "place_vision"]
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def place_vision(vlm: Any, inputs: Inputs, sequential: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Input embeddings (B, T, D) with the vision tokens in their places, and positions (3, B, T):
    M-RoPE's, or with `sequential` three times 0, 1, 2, ..."""
    ids = inputs["input_ids"]
    if sequential:
        return embed_with(vlm, inputs), (inputs["attention_mask"].cumsum(-1) - 1).clamp(
            min=0
        ).expand(3, -1, -1)
    positions, _ = vlm.model.get_rope_index(
        ids,
        (ids == vlm.config.image_token_id).int(),
        image_grid_thw=inputs["image_grid_thw"],
        attention_mask=inputs["attention_mask"],
    )
    return embed_with(vlm, inputs), positions


class VisionMixin(VisionBase):
    """Vision of Qwen's families: qwen-vl-utils sizes an image within the pixel budget, in whole
    tokens."""

    min_pixels: int
    max_pixels: int

    @staticmethod
    def place(vlm: Any, inputs: Inputs, sequential: bool = False) -> Inputs:
        embeds, positions = place_vision(vlm, inputs, sequential)
        return {
            "inputs_embeds": embeds,
            "attention_mask": inputs["attention_mask"],
            "position_ids": positions,
        }

    def vision_settings(self) -> list[Any]:
        return [self.min_pixels, self.max_pixels, str(self.vlm.dtype), patches.VERSION]

    def prepare_images(self, images: Sequence[Image.Image]) -> Any:
        processor = self.processor.image_processor
        return processor(
            images=[self._sized(image) for image in images], do_resize=False, return_tensors="pt"
        )

    def _sized(self, image: Image.Image) -> Image.Image:
        """Within the pixel budget, as qwen-vl-utils does it. Where that leaves a long narrow
        picture without one side, as transformers' processor does it, which gives the side one token
        and may pass the budget along the other."""
        patch = self.processor.image_processor.patch_size
        budget = {
            "factor": patch * self.processor.image_processor.merge_size,
            "min_pixels": self.min_pixels,
            "max_pixels": self.max_pixels,
        }
        if min(smart_resize(image.height, image.width, **budget)) > 0:
            sides = {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}
            sized: Image.Image = fetch_image({"image": image, **sides}, image_patch_size=patch)
            return sized
        height, width = keeping_a_token(image.height, image.width, **budget)
        return image.resize((width, height))

    def make_tokens(self, images: Sequence[Image.Image], prepared: Any) -> list[VisionInput]:
        """The pixel budget is checked on what the processor really made."""
        visual, processor = self.vlm.model.visual, self.processor.image_processor
        grids = prepared["image_grid_thw"]
        for image, grid in zip(images, grids, strict=True):
            pixels = int(grid[1] * grid[2]) * processor.patch_size**2
            narrow = min(grid[1:]) == processor.merge_size
            assert pixels <= self.max_pixels or narrow, (
                f"an image of {pixels} pixels passed the budget of {self.max_pixels}"
            )
            enough = pixels >= self.min_pixels or image.width * image.height >= self.min_pixels
            assert enough, f"an image was enlarged to {pixels} pixels only, not {self.min_pixels}"
        out = visual(
            prepared["pixel_values"].to(self.device, visual.dtype), grid_thw=grids.to(self.device)
        )
        sizes = (grids.prod(-1) // visual.spatial_merge_size**2).tolist()
        return [
            VisionInput(tokens, (int(g[0]), int(g[1]), int(g[2])))
            for tokens, g in zip(self.features(out).split(sizes), grids.tolist(), strict=True)
        ]

    def features(self, out: Any) -> torch.Tensor:
        """What is kept of the vision tower's output, a row per token."""
        merged: torch.Tensor = out.pooler_output
        return merged


class QwenEmbedder(VisionMixin, VlmEmbedder):
    """What the embedders of Qwen's families share."""

    image_sign = IMAGE

    def __init__(self, settings: QwenSettings, adapter: Path | None = None) -> None:
        self.min_pixels, self.max_pixels = settings.min_pixels, settings.max_pixels
        super().__init__(settings, adapter)

    def image_length(self, grid: Grid) -> int:
        return grid[0] * grid[1] * grid[2] // int(self.vlm.model.visual.spatial_merge_size) ** 2


class Qwen2VL(QwenEmbedder):
    """The Qwen2-VL embedder."""

    types: ClassVar[tuple[str, ...]] = ("qwen2_vl",)
