"""Settings of the embedders; the union is the registry."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from cirloop.settings import Settings

if TYPE_CHECKING:
    from cirloop.backbones.qwen2_vl import Qwen2VL


class Qwen2VLSettings(Settings):
    """Qwen2-VL, used the VLM2Vec way (arXiv 2410.05160): last token, unit norm, instruction before the text."""

    type: Literal["qwen2_vl"] = "qwen2_vl"
    path: str = "tiny"
    """Model directory or hub name; `tiny` is the embedded model."""
    query_prompt: str = "Given an image, find a similar everyday image with the described changes: {text}"
    document_prompt: str = "Represent the given image."
    min_pixels: int = Field(28 * 28, ge=28 * 28)
    """Smallest image after resizing, in pixels."""
    max_pixels: int = Field(256 * 28 * 28, ge=28 * 28)
    """Largest image after resizing, in pixels; 28x28 of them make one token."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    gradient_checkpointing: bool = False

    def build(self, adapter: Path | None = None) -> Qwen2VL:
        from cirloop.backbones.qwen2_vl import Qwen2VL

        return Qwen2VL(self, adapter)


BackboneConfig = Qwen2VLSettings
