"""Settings of captioning; the union of foundation models is the registry."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from cirloop.backbones.config import ModelSettings
from cirloop.settings import Settings

if TYPE_CHECKING:
    from cirloop.captioning.qwen2_vl import Qwen2VLCaptioner


class Qwen2VLFoundation(ModelSettings):
    """Qwen2-VL as the foundation model, in its multi-image conversation form."""

    type: Literal["qwen2_vl"] = "qwen2_vl"
    path: str = "tiny"
    """Model directory or hub name; `tiny` is the embedded model."""
    min_pixels: int = Field(28 * 28, ge=28 * 28)
    max_pixels: int = Field(256 * 28 * 28, ge=28 * 28)
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"

    def build(self) -> Qwen2VLCaptioner:
        from cirloop.captioning.qwen2_vl import Qwen2VLCaptioner

        return Qwen2VLCaptioner(self)


FoundationConfig = Qwen2VLFoundation


class CaptioningSettings(Settings):
    """How texts are written and which are believed."""

    enabled: bool = True
    """False: mined images are used as negatives only."""
    candidates: int = Field(4, ge=1)
    """Texts per mined image: one greedy, the rest sampled; the one that passes the checks best is kept."""
    temperature: float = Field(0.7, gt=0)
    batch_size: int = Field(64, ge=1)
    """Questions per generation batch. It decides the random numbers a text is sampled with, so it is here."""
    max_new_tokens: int = Field(48, ge=4)
    min_words: int = Field(2, ge=1)
    max_words: int = Field(40, ge=1)
    verify: float = Field(0.5, ge=0, lt=1)
    """Least probability of "yes" when the foundation model is asked if the text is right; 0 = do not ask."""
    round_trip: int = Field(20, ge=0)
    """Lowest rank the current embedder may give the mined image for the new text; 0 = do not check."""
    max_per_query: int = Field(3, ge=1)
    """Augmented triplets kept per human query and iteration, the surest first."""
