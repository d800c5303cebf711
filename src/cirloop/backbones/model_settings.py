"""Settings that all embedders have, all vision-language models, and all of Qwen's families."""

from __future__ import annotations

from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from cirloop.backbones.prompts import PromptFormat, fitting, load
from cirloop.backbones.weights import resolve, resolve_adapter, weights_digest
from cirloop.config.base import Settings
from cirloop.types import UserError

if TYPE_CHECKING:
    from cirloop.backbones.base import Backbone, TuningSettings
    from cirloop.validation import ValidationReport


class ModelSettings(Settings):
    """Settings of any model: where its weights are."""

    type: str
    path: str

    def resolve_dir(self) -> Path:
        """Return the local directory of the weights. Raises UserError with all that is wrong."""
        return resolve(self.path, self.type)

    def weights_digest(self) -> str:
        """Return the digest of all on disk that decides the model's output.

        It stands for `path` in fingerprints.
        """
        return weights_digest(self.resolve_dir())

    def path_digests(self) -> dict[str, str | None]:
        """Return the settings that are paths, each replaced by the digest of what lies there."""
        return {"path": self.weights_digest()}


class EmbedderSettings(ModelSettings):
    """Settings of an embedder."""

    multi_vector: ClassVar[bool] = False
    """Whether a gallery image has several vectors, which no index searches."""

    def check_training(self, tuning: TuningSettings) -> None:
        """Raise UserError where the settings show that this model cannot be trained so."""
        if tuning.lora.dtype == "base":
            raise UserError(
                f"training.lora.dtype base is for LoRA on a language model, not for {self.type}:"
                " leave it at float32."
            )

    def check_sharded(self, problems: ValidationReport) -> None:
        """Add a problem for each setting that does not go with the sharded weights of ZeRO-3 and
        FSDP2."""

    def build(self, adapter: Path | None = None) -> Backbone:
        """Load the embedder, with the trained weights in `adapter`."""
        from cirloop.backbones import EMBEDDERS

        backbone: Backbone = resolve_name(EMBEDDERS[self.type])(self, adapter)
        return backbone


class VlmSettings(EmbedderSettings):
    """A language model that sees, used the VLM2Vec way (arXiv 2410.05160): last token, unit norm,
    an instruction."""

    type: str
    path: str
    """Model directory or hub name: a base model, or an embedder whose adapter is merged into it."""
    start_adapter: str | None = None
    """Directory or hub name of a published LoRA, such as VLM2Vec's, to start from; training goes on
    with it."""
    prompt_format: str = "instruction"
    """Format of the model's prompts: the name of a packaged one (instruction, chat, vlm2vec, gme,
    qwen3_vl_embedding, recall_cirr, recall_fashioniq) or a .yaml file like them. Published weights
    need their own."""
    query_prompt: str | None = None
    """The instruction of a query, in place of the format's; `{text}` is the modification text,
    where the format has it in its instruction. None: the format's."""
    document_prompt: str | None = None
    """The instruction of a gallery image, in place of the format's. None: the format's."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Dtype of the base model; LoRA weights are float32, or in training `training.lora.dtype`."""
    quantization: Literal["none", "nf4"] = "none"
    """`nf4`: the language model's frozen weights in 4 bits (QLoRA, arXiv 2305.14314); needs
    bitsandbytes and CUDA."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation of transformers."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    packed: bool = False
    """Rows of a batch one after another in one row without padding, each seeing only itself;
    checked at the start."""
    compile: bool = False
    """torch.compile of the language model's layers; checked at the start, which compiles them."""

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, values: object) -> object:
        if isinstance(values, dict) and "prompts" in values:
            raise ValueError(
                f"prompts {values['prompts']!r}: prompt_format says what is read now. What"
                " `prompts: vlm2vec` was is `prompt_format: instruction`, the default;"
                " `prompt_format: vlm2vec` is VLM2Vec's own input; `prompts: chat` is"
                " `prompt_format: chat`"
            )
        return values

    @model_validator(mode="after")
    def _reads(self) -> VlmSettings:
        prompts = self.load_prompt_format()
        if self.type not in prompts.families:
            raise ValueError(
                f"prompt_format {self.prompt_format!r} is for {', '.join(prompts.families)}; for"
                f" {self.type} there are {', '.join(fitting(self.type))}, or a .yaml file"
            )
        prompts.check_prompts(self.query_prompt, self.document_prompt)
        return self

    def load_prompt_format(self) -> PromptFormat:
        """Load the prompt format. Raises UserError where it does not exist or is damaged."""
        return load(self.prompt_format)

    def check_training(self, tuning: TuningSettings) -> None:
        """Raise UserError where quantization or dtype forbids this training."""
        if self.quantization != "none" and tuning.finetuning == "full":
            raise UserError(
                f"training.finetuning full cannot train weights of {self.quantization}. Set"
                " training.finetuning lora or dora, or model.quantization none."
            )
        if tuning.lora.dtype == "base":
            self._check_adapters_in_half(tuning)

    def check_sharded(self, problems: ValidationReport) -> None:
        """Add a problem for each setting that does not go with the sharded weights of ZeRO-3 and
        FSDP2."""
        for name, value, required in (
            ("compile", self.compile, False),
            ("quantization", self.quantization, "none"),
        ):
            if value != required:
                problems.add(
                    f"model.{name}",
                    "is not available where weights are sharded (DeepSpeed ZeRO-3, FSDP2); set it"
                    f" to {str(required).lower()}, or keep weights whole (ZeRO-2, DDP)",
                )

    def _check_adapters_in_half(self, tuning: TuningSettings) -> None:
        ways = "or set training.lora.dtype float32."
        if tuning.finetuning in ("full", "dora"):
            raise UserError(
                "training.lora.dtype base is for a plain LoRA, not for training.finetuning"
                f" {tuning.finetuning}: set training.finetuning lora, {ways}"
            )
        if self.dtype == "float16":
            raise UserError(
                "training.lora.dtype base with model.dtype float16: small gradients become zero"
                f" there. Set model.dtype bfloat16, {ways}"
            )

    def path_digests(self) -> dict[str, str | None]:
        """Return the digests of weights, start adapter and prompt format."""
        adapter = None
        if self.start_adapter is not None:
            adapter = weights_digest(resolve_adapter(self.start_adapter))
        prompt_format = self.load_prompt_format().digest
        return {**super().path_digests(), "start_adapter": adapter, "prompt_format": prompt_format}


class PixelBudget(Settings):
    """Sizes of images in Qwen's families: any, within a budget of pixels."""

    min_pixels: int = Field(28 * 28, ge=28 * 28)
    """Smallest image after resizing, in pixels."""
    max_pixels: int = Field(256 * 28 * 28, ge=28 * 28)
    """Largest image after resizing, in pixels; 28x28 of them make one token."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_pixels > self.max_pixels:
            raise ValueError(
                f"min_pixels {self.min_pixels} is more than max_pixels {self.max_pixels}"
            )
        return self


class Qwen3PixelBudget(PixelBudget):
    """Qwen3-VL's, with larger tokens."""

    min_pixels: int = Field(32 * 32, ge=32 * 32)
    """Smallest image after resizing, in pixels."""
    max_pixels: int = Field(256 * 32 * 32, ge=32 * 32)
    """Largest image after resizing, in pixels; 32x32 of them make one token."""


class QwenSettings(PixelBudget, VlmSettings):
    """Settings of Qwen's families."""
