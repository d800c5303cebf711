"""LLaVA-1.5 (arXiv 2310.03744), LLaVA-NeXT and LLaVA-OneVision (arXiv 2408.03326), whichever
config.json names.

An image is what the processor makes of it, so many tokens as the projector gives: one centre crop
(1.5), or the image and its tiles with padding cut off and a newline embedding after each row (the
others, `pack_image_features`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from cirloop.backbones.base import Grid, VisionInput
from cirloop.backbones.vision import Inputs, embed_with, plain
from cirloop.backbones.vlm import VlmEmbedder
from cirloop.types import UserError

if TYPE_CHECKING:
    from PIL import Image

TYPES = ("llava", "llava_next", "llava_onevision")


class Llava(VlmEmbedder):
    """The embedder of the three; `vision tower`, here, is the tower, the projector and the
    newline."""

    types: ClassVar[tuple[str, ...]] = TYPES
    image_sign = "<image>"

    @staticmethod
    def place(vlm: Any, inputs: Inputs, sequential: bool = False) -> Inputs:
        return {
            "inputs_embeds": embed_with(vlm, inputs),
            "attention_mask": inputs["attention_mask"],
        }

    def vision_settings(self) -> list[Any]:
        config = self.vlm.config
        names = (
            "vision_feature_layer",
            "vision_feature_select_strategy",
            "image_grid_pinpoints",
            "vision_aspect_ratio",
        )
        return [
            config.model_type,
            str(self.vlm.dtype),
            plain({n: getattr(config, n, None) for n in names}),
        ]

    def prepare_images(self, images: Sequence[Image.Image]) -> Any:
        return self.processor.image_processor(
            images=[i.convert("RGB") for i in images], return_tensors="pt"
        )

    def make_tokens(self, images: Sequence[Image.Image], prepared: Any) -> list[VisionInput]:
        """The size of crops and tiles is checked on what the processor really made."""
        pixels, side = prepared["pixel_values"], self.vlm.config.vision_config.image_size
        height, width = pixels.shape[-2:]
        if height != side or width != side:
            raise UserError(
                f"model path {self.settings.path!r}: the processor makes {height}x{width} pixels,"
                f" the vision tower takes {side}x{side}. Give the processor that belongs to the"
                " model."
            )
        more = (
            {}
            if self.vlm.config.model_type == "llava"
            else {"image_sizes": prepared["image_sizes"]}
        )
        tokens = self.vlm.model.get_image_features(
            pixel_values=pixels.to(self.device, self.vlm.model.vision_tower.dtype), **more
        ).pooler_output
        return [VisionInput(each, (1, 1, len(each))) for each in tokens]

    def image_length(self, grid: Grid) -> int:
        return grid[0] * grid[1] * grid[2]
