"""Qwen2-VL (arXiv 2409.12191): images of any size, a token per 28x28 pixels, positions in three
dimensions (M-RoPE)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from qwen_vl_utils import fetch_image, smart_resize
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize as keeping_a_token
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids

from cirloop.backbones import patches
from cirloop.backbones.base import (
    Grid,
    ImageFeatures,
    Inputs,
    PreparedImages,
    VisionLanguageModel,
)
from cirloop.backbones.packing import attention_of
from cirloop.backbones.transfer import to_device
from cirloop.backbones.vision import VisionBase, merge_vision_tokens
from cirloop.backbones.vlm import VlmEmbedder

if TYPE_CHECKING:
    from PIL import Image

    from cirloop.backbones.model_settings import QwenSettings

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
BOUNDS = ("cu_seqlens", "cu_window_seqlens")
"""Inputs of the tower that stay on the host, since all its layers but those of flash attention read
them: where the patches of images and windows begin."""


class VisionMixin(VisionBase):
    """Vision of Qwen's families: qwen-vl-utils sizes an image within the pixel budget, in whole
    tokens."""

    min_pixels: int
    max_pixels: int

    @staticmethod
    def language_model_inputs(vlm: VisionLanguageModel, inputs: Inputs) -> Inputs:
        """Return embeddings, mask and positions."""
        return {
            "inputs_embeds": merge_vision_tokens(vlm, inputs),
            "attention_mask": inputs["attention_mask"],
            "position_ids": inputs["position_ids"],
        }

    def positions(self, batch: Inputs) -> Inputs:
        """Return M-RoPE's positions (3, B, T), which transformers finds by reading row after
        row."""
        ids = batch["input_ids"]
        positions, _ = self.vlm.model.get_rope_index(
            ids,
            (ids == self.vlm.config.image_token_id).int(),
            image_grid_thw=batch["image_grid_thw"],
            attention_mask=batch["attention_mask"],
        )
        return {"position_ids": positions}

    def vision_settings(self) -> list[Any]:
        """Return pixel budget, dtype and the version of the patch embedding."""
        return [self.min_pixels, self.max_pixels, str(self.vlm.dtype), patches.VERSION]

    def prepare_images(self, images: Sequence[Image.Image]) -> PreparedImages:
        """Size images within the pixel budget and cut them into patches."""
        processor = self.processor.image_processor
        sized = [self._sized(image) for image in images]
        return processor(images=sized, do_resize=False, return_tensors="pt")

    def _sized(self, image: Image.Image) -> Image.Image:
        """Size an image within the pixel budget, as qwen-vl-utils does it.

        Where that leaves a long narrow image without one side, transformers' own rule applies: the
        side gets one token, and the other may exceed the budget.
        """
        processor = self.processor.image_processor
        budget = {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}
        factor = processor.patch_size * processor.merge_size
        if min(smart_resize(image.height, image.width, factor=factor, **budget)) > 0:
            sized: Image.Image = fetch_image(
                {"image": image, **budget}, image_patch_size=processor.patch_size
            )
            return sized
        height, width = keeping_a_token(image.height, image.width, factor=factor, **budget)
        return image.resize((width, height))

    def compute_tokens(
        self, images: Sequence[Image.Image], prepared: PreparedImages
    ) -> list[ImageFeatures]:
        """Compute vision tokens; check the pixel budget on what the processor really made."""
        visual = self.vlm.model.visual
        grids = prepared["image_grid_thw"]
        for image, grid in zip(images, grids, strict=True):
            self._check_budget(image, grid)
        pixels = to_device(prepared["pixel_values"], self.device, visual.dtype)
        stays = () if "flash" in attention_of(visual) else BOUNDS
        tower_inputs = {
            name: tensor if name in stays else to_device(tensor, self.device)
            for name, tensor in self.tower_inputs(grids).items()
        }
        output = visual(pixels, grid_thw=grids, **tower_inputs)
        sizes = (grids.prod(-1) // visual.spatial_merge_size**2).tolist()
        tokens_of_images = self.token_features(output).split(sizes)
        return [
            ImageFeatures(tokens, (int(grid[0]), int(grid[1]), int(grid[2])))
            for tokens, grid in zip(tokens_of_images, grids.tolist(), strict=True)
        ]

    def tower_inputs(self, grids: torch.Tensor) -> Inputs:
        """Return what the tower would make of the grids, on the host: transformers reads them image
        by image."""
        merge_size = self.vlm.model.visual.spatial_merge_size
        return {
            "position_ids": get_vision_position_ids(grids, merge_size),
            "cu_seqlens": get_vision_cu_seqlens(grids),
        }

    def _check_budget(self, image: Image.Image, grid: torch.Tensor) -> None:
        """Assert that an image with patches `grid` (frames, height, width) keeps the budget."""
        processor = self.processor.image_processor
        pixels = int(grid[1] * grid[2]) * processor.patch_size**2
        is_narrow = min(grid[1:]) == processor.merge_size
        assert pixels <= self.max_pixels or is_narrow, (
            f"an image of {pixels} pixels passed the budget of {self.max_pixels}"
        )
        was_large = image.width * image.height >= self.min_pixels
        assert pixels >= self.min_pixels or was_large, (
            f"an image was enlarged to {pixels} pixels only, not {self.min_pixels}"
        )

    def token_features(self, output: Any) -> torch.Tensor:
        """Return what is kept of the vision tower's output, a row per token."""
        merged: torch.Tensor = output.pooler_output
        return merged


class QwenEmbedder(VisionMixin, VlmEmbedder):
    """An embedder of one of Qwen's families."""

    image_placeholder = IMAGE

    def __init__(self, settings: QwenSettings, adapter: Path | None = None) -> None:
        self.min_pixels = settings.min_pixels
        self.max_pixels = settings.max_pixels
        super().__init__(settings, adapter)

    def positions(self, batch: Inputs) -> Inputs:
        """Return M-RoPE's positions, or three times 0, 1, 2, ... where the prompt format says
        so."""
        if self.format.positions == "sequential":
            position_BT = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
            return {"position_ids": position_BT.repeat(3, 1, 1)}
        return super().positions(batch)

    def num_image_tokens(self, grid: Grid) -> int:
        """Count the vision tokens of an image: merged patches."""
        return grid[0] * grid[1] * grid[2] // int(self.vlm.model.visual.spatial_merge_size) ** 2


class Qwen2VL(QwenEmbedder):
    """The Qwen2-VL embedder."""
