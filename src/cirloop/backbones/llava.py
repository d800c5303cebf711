"""LLaVA-1.5 (arXiv 2310.03744), LLaVA-NeXT and LLaVA-OneVision (arXiv 2408.03326), whichever
config.json names.

An image has as many tokens as the projector makes of it: one centre crop (1.5), or the image and
its tiles with padding cut off and a newline embedding after each row (the others,
`pack_image_features`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cirloop.backbones.base import (
    Grid,
    ImageFeatures,
    Inputs,
    PreparedImages,
    VisionLanguageModel,
)
from cirloop.backbones.transfer import to_device
from cirloop.backbones.vision import merge_vision_tokens, to_json
from cirloop.backbones.vlm import VlmEmbedder
from cirloop.types import UserError

if TYPE_CHECKING:
    from PIL import Image


class Llava(VlmEmbedder):
    """The embedder of all three; its vision tower includes the projector and the newline."""

    image_placeholder = "<image>"

    @staticmethod
    def language_model_inputs(vlm: VisionLanguageModel, inputs: Inputs) -> Inputs:
        """Return embeddings and mask; the model numbers all tokens as text."""
        return {
            "inputs_embeds": merge_vision_tokens(vlm, inputs),
            "attention_mask": inputs["attention_mask"],
        }

    def vision_settings(self) -> list[Any]:
        """Return what decides which features are taken and how tiles are laid out."""
        config = self.vlm.config
        names = (
            "vision_feature_layer",
            "vision_feature_select_strategy",
            "image_grid_pinpoints",
            "vision_aspect_ratio",
        )
        settings = {name: getattr(config, name, None) for name in names}
        return [config.model_type, str(self.vlm.dtype), to_json(settings)]

    def prepare_images(self, images: Sequence[Image.Image]) -> PreparedImages:
        """Crop images, or cut them into tiles."""
        return self.processor.image_processor(
            images=[image.convert("RGB") for image in images], return_tensors="pt"
        )

    def compute_tokens(
        self, images: Sequence[Image.Image], prepared: PreparedImages
    ) -> list[ImageFeatures]:
        """Compute vision tokens; check the size of crops and tiles that the processor made."""
        pixels = prepared["pixel_values"]
        side = self.vlm.config.vision_config.image_size
        height, width = pixels.shape[-2:]
        if height != side or width != side:
            raise UserError(
                f"model path {self.settings.path!r}: the processor makes {height}x{width} pixels,"
                f" the vision tower takes {side}x{side}. Give the processor that belongs to the"
                " model."
            )
        sizes = {}
        if self.vlm.config.model_type != "llava":
            sizes["image_sizes"] = prepared["image_sizes"]
        output = self.vlm.model.get_image_features(
            pixel_values=to_device(pixels, self.device, self.vlm.model.vision_tower.dtype), **sizes
        )
        return [ImageFeatures(tokens, (1, 1, len(tokens))) for tokens in output.pooler_output]

    def num_image_tokens(self, grid: Grid) -> int:
        """Count the vision tokens of an image."""
        return grid[0] * grid[1] * grid[2]
