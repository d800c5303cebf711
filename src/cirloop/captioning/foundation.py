"""Settings of foundation models; the union is the registry."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from cirloop.backbones.model_settings import ModelSettings, PixelBudget, Qwen3PixelBudget
from cirloop.backbones.weights import resolve
from cirloop.captioning.foundation_base import Foundation as Foundation
from cirloop.captioning.server_settings import ServerFoundation as ServerFoundation
from cirloop.captioning.without_model import CatalogueFoundation as CatalogueFoundation
from cirloop.captioning.without_model import TemplateFoundation as TemplateFoundation
from cirloop.config.base import default_type
from cirloop.types import UserError

if TYPE_CHECKING:
    from cirloop.backbones.vlm import VlmEmbedder
    from cirloop.captioning.base import Captioner
    from cirloop.types import TrainSplit

logger = logging.getLogger(__name__)
Dtype = Literal["float32", "bfloat16", "float16"]
Attention = Literal["sdpa", "eager", "flash_attention_2"]


class LoadedFoundation(Foundation):
    """Settings of a model that transformers loads."""

    dtype: Dtype = "bfloat16"
    """Dtype of its weights."""
    attention: Attention = "sdpa"
    """Attention implementation of transformers."""

    def shares_base_with(self, model: ModelSettings) -> bool:
        embedder_form = (
            model.type,
            getattr(model, "dtype", None),
            getattr(model, "attention", None),
            getattr(model, "quantization", "none"),
        )
        if embedder_form != (self.type, self.dtype, self.attention, "none"):
            return False
        return self.weights_digest() == model.weights_digest()


class QwenFoundation(PixelBudget, LoadedFoundation):
    """Settings of a Qwen-VL: two images in one conversation, vision tokens from the embedder's
    cache."""


class Qwen2VLFoundation(QwenFoundation):
    """Qwen2-VL as the foundation model, in its multi-image conversation form."""

    type: Literal["qwen2_vl"] = "qwen2_vl"
    path: str = "tiny"
    """Model directory or hub name; `tiny` is the embedded model."""


class Qwen25VLFoundation(QwenFoundation):
    """Qwen2.5-VL as the foundation model, in its multi-image conversation form."""

    type: Literal["qwen2_5_vl"] = "qwen2_5_vl"
    path: str = "Qwen/Qwen2.5-VL-3B-Instruct"
    """Model directory or hub name."""


class Qwen3VLFoundation(Qwen3PixelBudget, QwenFoundation):
    """Qwen3-VL as the foundation model, in its multi-image conversation form."""

    type: Literal["qwen3_vl"] = "qwen3_vl"
    path: str = "Qwen/Qwen3-VL-2B-Instruct"
    """Model directory or hub name."""


class LlavaFoundation(LoadedFoundation):
    """LLaVA-1.5, LLaVA-NeXT or LLaVA-OneVision, shown the two images side by side in one."""

    concatenates_images: ClassVar[bool] = True
    type: Literal["llava"] = "llava"
    path: str = "llava-hf/llava-1.5-7b-hf"
    """Model directory or hub name, with a chat template."""
    max_side: int = Field(672, ge=28)
    """Longest side of either image, in pixels; a larger one is scaled down before they are put
    together."""

    def resolve_dir(self) -> Path:
        return resolve(self.path, "llava", "llava_next", "llava_onevision")


class GenericFoundation(LoadedFoundation):
    """Any image-text-to-text model of transformers that takes two images, through its own chat
    template."""

    type: Literal["generic"] = "generic"
    path: str
    """Model directory or hub name, with a chat template."""
    max_side: int = Field(672, ge=28)
    """Longest side of an image, in pixels; a larger one is scaled down."""

    def resolve_dir(self) -> Path:
        return resolve(self.path)


class VllmFoundation(Foundation):
    """Any model that vLLM serves with two images, by its offline engine, in an environment of its
    own (scripts/vllm_env.sh). It takes GPUs by itself, from the first on: only the driver loads it.
    """

    in_processes: ClassVar[bool] = False
    is_timed: ClassVar[bool] = False
    resultless: ClassVar[frozenset[str]] = frozenset(
        {"gpu_memory_utilization", "max_num_seqs", "tensor_parallel_size", "enforce_eager"}
    )
    type: Literal["vllm"] = "vllm"
    path: str = "Qwen/Qwen2.5-VL-7B-Instruct"
    """Model directory or hub name, with a chat template."""
    max_side: int = Field(672, ge=28)
    """Longest side of an image, in pixels; a larger one is scaled down."""
    dtype: Dtype = "bfloat16"
    """Dtype of its weights."""
    quantization: str | None = None
    """Quantization by vLLM's name for it, such as fp8 or awq. None: as the weights are."""
    max_model_len: int = Field(8192, ge=256)
    """Most tokens of a request with its images and answer."""
    gpu_memory_utilization: float = Field(0.6, gt=0, le=1)
    """Share of the GPU's memory that vLLM takes at once; the embedder needs some of the rest."""
    tensor_parallel_size: int = Field(1, ge=1)
    """GPUs over which each layer's weights are spread."""
    max_num_seqs: int | None = Field(None, ge=1)
    """Most answers that are written at once. None: vLLM's own number."""
    enforce_eager: bool = False
    """Run layers as they are, without compiling them: a quicker start, slower texts."""

    def resolve_dir(self) -> Path:
        if find_spec("vllm") is None:
            raise UserError(
                "foundation.type vllm: vLLM is not installed here. It pins its own torch, so"
                " scripts/vllm_env.sh makes an environment of its own: run this by"
                " .venv-vllm/bin/python. Or start its server there and use"
                " --foundation_model_backbone server (docs/servers.md)."
            )
        return resolve(self.path)

    def build(
        self, embedder: VlmEmbedder | None = None, train: TrainSplit | None = None
    ) -> Captioner:
        from cirloop.captioning.backends.vllm_engine import VllmCaptioner

        return VllmCaptioner(self)


FoundationConfig = Annotated[
    CatalogueFoundation
    | GenericFoundation
    | LlavaFoundation
    | Qwen2VLFoundation
    | Qwen25VLFoundation
    | Qwen3VLFoundation
    | ServerFoundation
    | TemplateFoundation
    | VllmFoundation,
    Field(discriminator="type"),
    BeforeValidator(default_type("qwen2_vl")),
]


def match_dtype(foundation: Foundation, model: ModelSettings, by_flag: bool) -> Foundation:
    """Give the foundation model the embedder's dtype where both are one model.

    Otherwise two copies would be loaded, and two vision caches kept. A dtype that the user gave for
    the foundation model holds, but one in a file gives way where a flag (`by_flag`) sets the
    embedder's.
    """
    dtype = getattr(foundation, "dtype", None)
    embedder_dtype = getattr(model, "dtype", None)
    one_model = (model.type, model.path) == (foundation.type, foundation.path)
    user_gave_dtype = "dtype" in foundation.model_fields_set and not by_flag
    if not one_model or embedder_dtype == dtype or user_gave_dtype:
        return foundation
    logger.info(
        "foundation.dtype is %s like model.dtype, not %s: both are %s, so one copy serves both; "
        "--foundation.dtype sets another",
        embedder_dtype,
        dtype,
        model.path,
    )
    return foundation.model_copy(update={"dtype": embedder_dtype})
