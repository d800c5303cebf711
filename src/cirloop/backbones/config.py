"""Settings of the embedders; the union is the registry."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from cirloop.backbones.weights import resolve, weights_digest
from cirloop.settings import Settings, default_type

if TYPE_CHECKING:
    from cirloop.backbones.base import Backbone


class ModelSettings(Settings):
    """What every model's settings have: where its weights are."""

    type: str
    path: str

    def find(self) -> Path:
        """The local directory of the weights. Raises UserError with all that is wrong."""
        return resolve(self.path, self.type)

    def weights(self) -> str:
        """Digest of everything on disk that decides what the model gives; stands for `path` in fingerprints."""
        return weights_digest(self.find())


class VlmSettings(ModelSettings):
    """A language model that sees, used the VLM2Vec way (arXiv 2410.05160): last token, unit norm, an instruction."""

    path: str = "tiny"
    """Model directory or hub name; `tiny` is the embedded model, a Qwen2-VL."""
    query_prompt: str = "Given an image, find a similar everyday image with the described changes: {text}"
    document_prompt: str = "Represent the given image."
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    gradient_checkpointing: bool = False


class Qwen2VLSettings(VlmSettings):
    """Qwen2-VL, used the VLM2Vec way (arXiv 2410.05160): last token, unit norm, instruction before the text."""

    type: Literal["qwen2_vl"] = "qwen2_vl"
    min_pixels: int = Field(28 * 28, ge=28 * 28)
    """Smallest image after resizing, in pixels."""
    max_pixels: int = Field(256 * 28 * 28, ge=28 * 28)
    """Largest image after resizing, in pixels; 28x28 of them make one token."""

    def build(self, adapter: Path | None = None) -> Any:
        from cirloop.backbones.qwen2_vl import Qwen2VL

        return Qwen2VL(self, adapter)


class Blip2Settings(ModelSettings):
    """BLIP-2 as QuRe uses it (ICML 2025, arXiv 2507.12416): trained Q-Former, 32 vectors per gallery image."""

    type: Literal["blip2"] = "blip2"
    path: str = "Salesforce/blip2-itm-vit-g"
    """Directory or hub name of a `Blip2ForImageTextRetrieval`."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the frozen vision tower; the trained parts are float32."""
    max_words: int = Field(32, ge=4)
    """Tokens kept of a text."""

    def build(self, adapter: Path | None = None) -> Backbone:
        from cirloop.backbones.blip2 import Blip2

        return Blip2(self, adapter)


class ClipCombinerSettings(ModelSettings):
    """CLIP by open_clip with a combiner of picture and text (CLIP4Cir, ACM TOMM 2023)."""

    type: Literal["clip_combiner"] = "clip_combiner"
    clip: str = "RN50x4"
    """Architecture, by open_clip's name."""
    path: str = "openai"
    """Weights: a `.safetensors` file, open_clip's tag of published ones, or `random` for none at all."""
    combiner: Literal["sum", "combiner", "attention_fusion"] = "combiner"
    train_clip: bool = False
    """Train CLIP too; its features are then no longer kept."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def build(self, adapter: Path | None = None) -> Backbone:
        from cirloop.backbones.clip_combiner import ClipCombiner

        return ClipCombiner(self, adapter)


BackboneConfig = Annotated[
    Blip2Settings | ClipCombinerSettings | Qwen2VLSettings,
    Field(discriminator="type"),
    BeforeValidator(default_type("qwen2_vl")),
]
