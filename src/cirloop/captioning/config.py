"""Settings of captioning; the union of foundation models is the registry."""

from __future__ import annotations

import logging
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from cirloop.artifacts.store import fingerprint
from cirloop.backbones.model_settings import ModelSettings
from cirloop.backbones.weights import resolve
from cirloop.captioning.prompts import Prompts, load, packaged
from cirloop.config.base import Settings, default_type
from cirloop.types import UserError

if TYPE_CHECKING:
    from cirloop.captioning.base import Captioner

logger = logging.getLogger(__name__)
Dtype = Literal["float32", "bfloat16", "float16"]
Attention = Literal["sdpa", "eager", "flash_attention_2"]


class Foundation(ModelSettings):
    """What every foundation model's settings have."""

    side_by_side: ClassVar[bool] = False
    """Shown one picture that holds both."""
    judges: ClassVar[bool] = True
    """Can say whether a text is right."""

    def build(self, shared: Any | None = None) -> Captioner:
        """The captioner; on the weights of the embedder `shared` where that is the same base, else
        on its own."""
        raise NotImplementedError

    def shares(self, model: ModelSettings) -> bool:
        """Whether an embedder with these settings has the same base in the same form."""
        return False


class LoadedFoundation(Foundation):
    """A model that transformers loads."""

    dtype: Dtype = "bfloat16"
    """Of its weights."""
    attention: Attention = "sdpa"
    """The implementation that transformers takes."""

    def shares(self, model: ModelSettings) -> bool:
        """The pixel budget may differ: it is the captioner's own."""
        form = (self.type, self.dtype, self.attention)
        there = (model.type, getattr(model, "dtype", None), getattr(model, "attention", None))
        whole = getattr(model, "quantization", "none") == "none"
        return whole and form == there and self.weights() == model.weights()


class QwenFoundation(LoadedFoundation):
    """What the Qwen-VLs have: two pictures in one conversation, vision tokens from the embedder's
    cache."""

    min_pixels: int
    max_pixels: int

    @model_validator(mode="after")
    def _ordered(self) -> QwenFoundation:
        if self.min_pixels > self.max_pixels:
            raise ValueError(
                f"min_pixels {self.min_pixels} is more than max_pixels {self.max_pixels}"
            )
        return self

    def build(self, shared: Any | None = None) -> Captioner:
        from cirloop.captioning.backends.qwen_vl import CAPTIONERS

        return CAPTIONERS[self.type](self, shared)


class Qwen2VLFoundation(QwenFoundation):
    """Qwen2-VL as the foundation model, in its multi-image conversation form."""

    type: Literal["qwen2_vl"] = "qwen2_vl"
    path: str = "tiny"
    """Model directory or hub name; `tiny` is the embedded model."""
    min_pixels: int = Field(28 * 28, ge=28 * 28)
    """Smallest image after resizing, in pixels."""
    max_pixels: int = Field(256 * 28 * 28, ge=28 * 28)
    """Largest image after resizing, in pixels; 28x28 of them make one token."""


class Qwen25VLFoundation(QwenFoundation):
    """Qwen2.5-VL as the foundation model, in its multi-image conversation form."""

    type: Literal["qwen2_5_vl"] = "qwen2_5_vl"
    path: str = "Qwen/Qwen2.5-VL-3B-Instruct"
    """Model directory or hub name."""
    min_pixels: int = Field(28 * 28, ge=28 * 28)
    """Smallest image after resizing, in pixels."""
    max_pixels: int = Field(256 * 28 * 28, ge=28 * 28)
    """Largest image after resizing, in pixels; 28x28 of them make one token."""


class Qwen3VLFoundation(QwenFoundation):
    """Qwen3-VL as the foundation model, in its multi-image conversation form."""

    type: Literal["qwen3_vl"] = "qwen3_vl"
    path: str = "Qwen/Qwen3-VL-2B-Instruct"
    """Model directory or hub name."""
    min_pixels: int = Field(32 * 32, ge=32 * 32)
    """Smallest image after resizing, in pixels."""
    max_pixels: int = Field(256 * 32 * 32, ge=32 * 32)
    """Largest image after resizing, in pixels; 32x32 of them make one token."""


class LlavaFoundation(LoadedFoundation):
    """LLaVA-1.5, LLaVA-NeXT or LLaVA-OneVision, shown the two pictures side by side in one."""

    side_by_side: ClassVar[bool] = True
    type: Literal["llava"] = "llava"
    path: str = "llava-hf/llava-1.5-7b-hf"
    """Model directory or hub name, with a chat template."""
    max_side: int = Field(672, ge=28)
    """Longest side of either picture, in pixels; a larger one is scaled down before they are put
    together."""

    def find(self) -> Path:
        return resolve(self.path, "llava", "llava_next", "llava_onevision")

    def build(self, shared: Any | None = None) -> Captioner:
        from cirloop.captioning.backends.hf_captioner import LlavaCaptioner

        return LlavaCaptioner(self, shared)


class GenericFoundation(LoadedFoundation):
    """Any image-text-to-text model of transformers that takes two images, through its own chat
    template."""

    type: Literal["generic"] = "generic"
    path: str
    """Model directory or hub name, with a chat template."""
    max_side: int = Field(672, ge=28)
    """Longest side of a picture, in pixels; a larger one is scaled down first."""

    def find(self) -> Path:
        return resolve(self.path)

    def build(self, shared: Any | None = None) -> Captioner:
        from cirloop.captioning.backends.hf_captioner import PictureCaptioner

        return PictureCaptioner(self, shared)


class VllmFoundation(Foundation):
    """Any model that vLLM serves with two images, by its offline engine. Written against vLLM's
    documented interface and tested with a stand-in that speaks it, never with vLLM itself."""

    type: Literal["vllm"] = "vllm"
    path: str = "Qwen/Qwen2.5-VL-7B-Instruct"
    """Model directory or hub name, with a chat template."""
    max_side: int = Field(672, ge=28)
    """Longest side of a picture, in pixels; a larger one is scaled down first."""
    dtype: Dtype = "bfloat16"
    """Of its weights."""
    max_model_len: int = Field(8192, ge=256)
    """Tokens of a question with its pictures and answer, at most."""
    gpu_memory_utilization: float = Field(0.6, gt=0, le=1)
    """Share of the GPU's memory that vLLM takes at once; the embedder needs some of the rest."""

    def find(self) -> Path:
        if find_spec("vllm") is None:
            raise UserError(
                "foundation.type vllm: vLLM is not installed here. It pins its own torch, so give"
                " it an environment of its own: python -m venv .venv-vllm, pip install vllm into"
                " that, then pip install -e . and run from there; or use another"
                " --foundation_model_backbone."
            )
        return resolve(self.path)

    def build(self, shared: Any | None = None) -> Captioner:
        from cirloop.captioning.backends.vllm_engine import VllmCaptioner

        return VllmCaptioner(self)


class TemplateFoundation(Foundation):
    """No model: a rule rewrites the human text without a look at the pictures. For dry runs of the
    machinery; every text is marked `template (no model)`, and nothing follows from the results. It
    cannot judge, so `captioning.min_verify_probability` must be 0."""

    judges: ClassVar[bool] = False
    type: Literal["template"] = "template"
    path: str = ""
    """Not used."""

    def find(self) -> Path:
        return Path(str(files("cirloop.captioning")))

    def weights(self) -> str:
        from cirloop.captioning.backends.template import VERSION

        return fingerprint(VERSION)

    def build(self, shared: Any | None = None) -> Captioner:
        from cirloop.captioning.backends.template import TemplateCaptioner

        return TemplateCaptioner()


FoundationConfig = Annotated[
    GenericFoundation
    | LlavaFoundation
    | Qwen2VLFoundation
    | Qwen25VLFoundation
    | Qwen3VLFoundation
    | TemplateFoundation
    | VllmFoundation,
    Field(discriminator="type"),
    BeforeValidator(default_type("qwen2_vl")),
]


def one_dtype(foundation: Foundation, model: ModelSettings, by_flag: bool) -> Foundation:
    """The foundation with the embedder's dtype where both are one model and nobody gave the
    foundation's: else two copies would be loaded, and two vision caches kept. A dtype in a file
    gives way where a flag gives the embedder's."""
    wanted, dtype = getattr(model, "dtype", None), getattr(foundation, "dtype", None)
    one = (model.type, model.path) == (foundation.type, foundation.path)
    if not one or wanted == dtype or not (by_flag or "dtype" not in foundation.model_fields_set):
        return foundation
    logger.info(
        "foundation.dtype is %s like model.dtype, not %s: both are %s, so one copy serves both; "
        "--foundation.dtype sets another",
        wanted,
        dtype,
        model.path,
    )
    return foundation.model_copy(update={"dtype": wanted})


class CaptioningSettings(Settings):
    """How texts are written and which are believed."""

    enabled: bool = True
    """False: mined images are used as negatives only."""
    num_candidates: int = Field(4, ge=1)
    """Texts per mined image: one greedy, the rest sampled; the one that passes the checks best is
    kept."""
    temperature: float = Field(0.7, gt=0)
    """Of the sampled texts."""
    batch_size: int = Field(64, ge=1)
    """Questions per generation batch. It decides the random numbers a text is sampled with, so it
    is here."""
    max_new_tokens: int = Field(48, ge=4)
    """Tokens of an answer, at most."""
    rewrite_prompt: str | None = None
    """What asks for a text: the name of a packaged prompt or a .yaml file like them. None:
    rewrite-2, for llava rewrite-side-1."""
    verify_prompt: str | None = None
    """What asks if a text is right. None: verify-1, for llava verify-side-1."""
    min_words: int = Field(2, ge=1)
    """A shorter text is rejected."""
    max_words: int = Field(40, ge=1)
    """A longer text is rejected."""
    min_verify_probability: float = Field(0.5, ge=0, lt=1)
    """Least probability of "yes" when the foundation model is asked if the text is right; 0 = do
    not ask."""
    max_round_trip_rank: int = Field(20, ge=0)
    """Lowest rank the current embedder may give the mined image for the new text; 0 = do not
    check."""
    max_per_query: int = Field(3, ge=1)
    """Augmented triplets kept per human query and iteration, the surest first."""

    def prompts(self, foundation: Foundation) -> Prompts:
        """What this foundation model is asked. Raises UserError for a prompt that is not there or
        does not fit."""
        rewrite, side = (
            ("rewrite-side-1", "-side") if foundation.side_by_side else ("rewrite-2", "")
        )
        found = Prompts(
            load(self.rewrite_prompt or rewrite),
            load(self.verify_prompt or f"verify{side}-1"),
            load(f"describe{side}-1"),
        )
        wanted = 1 if foundation.side_by_side else 2
        for setting, prompt, answers in (
            ("captioning.rewrite_prompt", found.rewrite, ("plain", "json")),
            ("captioning.verify_prompt", found.verify, ("yes_no",)),
        ):
            if prompt.num_images != wanted or prompt.answer not in answers:
                raise UserError(
                    f"{setting} {prompt.name!r} has {prompt.num_images} places for an image and the"
                    f" answer {prompt.answer!r}; {foundation.type} needs {wanted} and"
                    f" {' or '.join(answers)}. Packaged are {', '.join(packaged())}."
                )
        return found

    def check(self, foundation: Foundation) -> None:
        """Raises UserError where these settings and the foundation model do not go together."""
        self.prompts(foundation)
        if self.min_verify_probability and not foundation.judges:
            raise UserError(
                f"captioning.min_verify_probability {self.min_verify_probability}: the foundation"
                f" model {foundation.type!r} looks at no picture and cannot judge a text. Set"
                " captioning.min_verify_probability to 0, or use another"
                " --foundation_model_backbone."
            )
