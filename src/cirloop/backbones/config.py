"""Settings of the embedders; the union is the registry."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from cirloop.artifacts import fingerprint
from cirloop.backbones.prompts import PromptFormat, fitting, load
from cirloop.backbones.weights import resolve, resolve_adapter, weights_digest
from cirloop.settings import Settings, default_type
from cirloop.types import UserError

if TYPE_CHECKING:
    from cirloop.backbones.base import Backbone, Tuning


class ModelSettings(Settings):
    """What every model's settings have: where its weights are."""

    several_vectors: ClassVar[bool] = False
    """A gallery image has several vectors, which no index searches."""
    type: str
    path: str

    def check_training(self, tuning: Tuning) -> None:
        """Raises UserError where a model of these settings cannot be trained so, as far as the settings tell."""
        if tuning.lora.dtype == "base":
            raise UserError(f"training.lora.dtype base is for LoRA on a language model, not for {self.type}: leave it "
                            "at float32.")  # fmt: skip

    def find(self) -> Path:
        """The local directory of the weights. Raises UserError with all that is wrong."""
        return resolve(self.path, self.type)

    def weights(self) -> str:
        """Digest of everything on disk that decides what the model gives; stands for `path` in fingerprints."""
        return weights_digest(self.find())

    def content(self) -> dict[str, str | None]:
        """The settings that are paths, each with the digest of what lies there in its place."""
        return {"path": self.weights()}


class VlmSettings(ModelSettings):
    """A language model that sees, used the VLM2Vec way (arXiv 2410.05160): last token, unit norm, an instruction."""

    type: str
    path: str
    """Model directory or hub name: a base model, or an embedder whose adapter is merged into it."""
    start_adapter: str | None = None
    """Directory or hub name of a published LoRA, such as VLM2Vec's, to start from; training goes on with it."""
    prompt_format: str = "instruction"
    """What the model reads: the name of a packaged format (instruction, chat, vlm2vec, gme, qwen3_vl_embedding,
    recall_cirr, recall_fashioniq) or a .yaml file like them. Published weights need their own."""
    query_prompt: str | None = None
    """The instruction of a query, in place of the format's; `{text}` is the modification text, where the format has it
    in its instruction. None: the format's."""
    document_prompt: str | None = None
    """The instruction of a gallery image, in place of the format's. None: the format's."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Of the base model; LoRA weights are float32, in training as `training.lora.dtype` says."""
    quantization: Literal["none", "nf4"] = "none"
    """`nf4`: the language model's frozen weights in 4 bits (QLoRA, arXiv 2305.14314); needs bitsandbytes and CUDA."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """The implementation that transformers takes."""
    gradient_checkpointing: bool = False
    """Compute activations anew in the backward pass: less memory, more time."""
    packed: bool = False
    """Rows of a batch one after another in one row without padding, each seeing only itself; checked at the start."""
    compile: bool = False
    """torch.compile of the language model's layers; checked at the start, which compiles them."""

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, values: Any) -> Any:
        if isinstance(values, dict) and "prompts" in values:
            raise ValueError(
                f"prompts {values['prompts']!r}: prompt_format says what is read now. What `prompts: vlm2vec` was is "
                "`prompt_format: instruction`, the default; `prompt_format: vlm2vec` is VLM2Vec's own input; "
                "`prompts: chat` is `prompt_format: chat`"
            )
        return values

    @model_validator(mode="after")
    def _reads(self) -> VlmSettings:
        prompts = self.reads()
        if self.type not in prompts.families:
            raise ValueError(
                f"prompt_format {self.prompt_format!r} is for {', '.join(prompts.families)}; for {self.type} there are "
                f"{', '.join(fitting(self.type))}, or a .yaml file"
            )
        prompts.check_prompts(self.query_prompt, self.document_prompt)
        return self

    def reads(self) -> PromptFormat:
        """The prompt format. Raises UserError where there is none of that name, or it is damaged."""
        return load(self.prompt_format)

    def check_training(self, tuning: Tuning) -> None:
        if self.quantization != "none" and tuning.tune == "full":
            raise UserError(
                f"training.tune full cannot train weights of {self.quantization}. Set training.tune lora or dora, or "
                "model.quantization none."
            )
        if tuning.lora.dtype == "base":
            self._check_adapters_in_half(tuning)

    def _check_adapters_in_half(self, tuning: Tuning) -> None:
        ways = "or set training.lora.dtype float32."
        if tuning.tune in ("full", "dora"):
            raise UserError(f"training.lora.dtype base is for a plain LoRA, not for training.tune {tuning.tune}: set "
                            f"training.tune lora, {ways}")  # fmt: skip
        if self.dtype == "float16":
            raise UserError("training.lora.dtype base with model.dtype float16: small gradients become zero there. Set "
                            f"model.dtype bfloat16, {ways}")  # fmt: skip

    def content(self) -> dict[str, str | None]:
        adapter = None if self.start_adapter is None else weights_digest(resolve_adapter(self.start_adapter))
        return {**super().content(), "start_adapter": adapter, "prompt_format": self.reads().digest}


class QwenSettings(VlmSettings):
    """What Qwen's families share: images of any size, within a budget of pixels."""

    min_pixels: int
    max_pixels: int

    @model_validator(mode="after")
    def _ordered(self) -> QwenSettings:
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels {self.min_pixels} is more than max_pixels {self.max_pixels}")
        return self


class Qwen2VLSettings(QwenSettings):
    """Qwen2-VL, used the VLM2Vec way (arXiv 2410.05160): last token, unit norm, an instruction."""

    type: Literal["qwen2_vl"] = "qwen2_vl"
    path: str = "tiny"
    """Model directory or hub name; `tiny` is the embedded model."""
    min_pixels: int = Field(28 * 28, ge=28 * 28)
    """Smallest image after resizing, in pixels."""
    max_pixels: int = Field(256 * 28 * 28, ge=28 * 28)
    """Largest image after resizing, in pixels; 28x28 of them make one token."""

    def build(self, adapter: Path | None = None) -> Any:
        from cirloop.backbones.qwen2_vl import Qwen2VL

        return Qwen2VL(self, adapter)


class Qwen25VLSettings(QwenSettings):
    """Qwen2.5-VL (arXiv 2502.13923), used the VLM2Vec way."""

    type: Literal["qwen2_5_vl"] = "qwen2_5_vl"
    path: str = "Qwen/Qwen2.5-VL-3B-Instruct"
    """Model directory or hub name."""
    min_pixels: int = Field(28 * 28, ge=28 * 28)
    """Smallest image after resizing, in pixels."""
    max_pixels: int = Field(256 * 28 * 28, ge=28 * 28)
    """Largest image after resizing, in pixels; 28x28 of them make one token."""

    def build(self, adapter: Path | None = None) -> Backbone:
        from cirloop.backbones.qwen2_5_vl import Qwen25VL

        return Qwen25VL(self, adapter)


class Qwen3VLSettings(QwenSettings):
    """Qwen3-VL (arXiv 2511.21631), used the VLM2Vec way."""

    type: Literal["qwen3_vl"] = "qwen3_vl"
    path: str = "Qwen/Qwen3-VL-2B-Instruct"
    """Model directory or hub name."""
    min_pixels: int = Field(32 * 32, ge=32 * 32)
    """Smallest image after resizing, in pixels."""
    max_pixels: int = Field(256 * 32 * 32, ge=32 * 32)
    """Largest image after resizing, in pixels; 32x32 of them make one token."""

    def build(self, adapter: Path | None = None) -> Backbone:
        from cirloop.backbones.qwen3_vl import Qwen3VL

        return Qwen3VL(self, adapter)


class LlavaSettings(VlmSettings):
    """LLaVA-1.5, LLaVA-NeXT or LLaVA-OneVision, whichever the model's config.json names, used the VLM2Vec way.

    The size of images is the processor's own.
    """

    type: Literal["llava"] = "llava"
    path: str = "llava-hf/llava-v1.6-mistral-7b-hf"
    """Model directory or hub name."""

    def find(self) -> Path:
        return resolve(self.path, "llava", "llava_next", "llava_onevision")

    def build(self, adapter: Path | None = None) -> Backbone:
        from cirloop.backbones.llava import Llava

        return Llava(self, adapter)


class Blip2Settings(ModelSettings):
    """BLIP-2 as QuRe uses it (ICML 2025, arXiv 2507.12416): trained Q-Former, 32 vectors per gallery image."""

    several_vectors: ClassVar[bool] = True
    type: Literal["blip2"] = "blip2"
    path: str = "Salesforce/blip2-itm-vit-g"
    """Directory or hub name of a `Blip2ForImageTextRetrieval`."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the frozen vision tower; the trained parts are float32."""
    max_tokens: int = Field(32, ge=4, le=512)
    """Word pieces kept of a text, with the two signs around it."""
    pad_ratio: float | None = Field(None, ge=1)
    """Images are padded until their long side is at most this many short ones, and their middle square is taken; QuRe
    has 1.25 (TargetPad of CLIP4Cir). By default they are squeezed into a square, as BLIP-2's processor does."""

    def find(self) -> Path:
        return resolve(self.path, "blip-2")

    def build(self, adapter: Path | None = None) -> Backbone:
        from cirloop.backbones.blip2 import Blip2

        return Blip2(self, adapter)


class ClipCombinerSettings(ModelSettings):
    """CLIP by open_clip with a combiner of image and text (CLIP4Cir, ACM TOMM 2023, arXiv 2308.11485).

    Trained weights are named `combiner...` and, with `train_clip`, `clip...`: `training.rates: {clip: 1.0e-6}` gives
    CLIP a rate of its own.
    """

    type: Literal["clip_combiner"] = "clip_combiner"
    clip: str = "RN50x4"
    """Architecture, by open_clip's name or as an open_clip model config ending in .json. Weights from a file that were
    trained with QuickGELU, as OpenAI's, need a name ending in -quickgelu; with a tag or a repository that is known."""
    path: str = "openai"
    """Weights: a `.safetensors` file; open_clip's tag of published ones, or `hf-hub:NAME`, which are fetched from the
    hub; a directory with such a repository's two files; or `random` for none at all. Pickles are not read."""
    random_seed: int = Field(0, ge=0)
    """Of the weights that are drawn: the combiner's, and CLIP's where `path` is `random`."""
    combiner: Literal["sum", "combiner", "attention_fusion"] = "combiner"
    """How image and text features become a query: their sum, CLIP4Cir's network, or attention between tokens."""
    combiner_width: int = Field(4, ge=1)
    """Width of the combiner's hidden layers, in dimensions of CLIP's embedding."""
    dropout: float = Field(0.5, ge=0, lt=1)
    """Of the combiner, while it is trained."""
    pad_ratio: float = Field(1.25, ge=0)
    """Images whose sides differ by more get black bars until they differ by this factor; 0 = none."""
    train_clip: bool = False
    """Train CLIP too, both towers; its image features are then no longer kept."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of CLIP; the combiner is float32, and so is a CLIP that is trained."""

    @field_validator("pad_ratio")
    @classmethod
    def _pads(cls, ratio: float) -> float:
        if 0 < ratio < 1:
            raise ValueError(f"{ratio} is no ratio of the longer side to the shorter: give 1 or more, or 0 for none")
        return ratio

    def check_training(self, tuning: Tuning) -> None:
        super().check_training(tuning)
        if tuning.tune not in (None, "full"):
            raise UserError(f"training.tune {tuning.tune!r}: clip_combiner is trained in full; leave the setting out.")
        if self.combiner == "sum" and not self.train_clip and not tuning.parts:
            raise UserError(
                "model.combiner `sum` has no weights and CLIP is frozen: nothing to train. Set model.train_clip, "
                "choose the combiner `combiner` or `attention_fusion`, or train for 0 steps."
            )

    def find(self) -> Path:
        """The file of the weights; of the architecture where they are drawn."""
        from cirloop.backbones.clip_source import find_source

        source = find_source(self.clip, self.path)
        return source.weights or source.config

    def weights(self) -> str:
        from cirloop.backbones.clip_source import find_source

        return find_source(self.clip, self.path).digest(self.random_seed)

    def content(self) -> dict[str, str | None]:
        """`weights` covers a config's content, so where its file lies does not matter."""
        return {**super().content(), "clip": None if self.clip.endswith(".json") else self.clip}

    def build(self, adapter: Path | None = None) -> Backbone:
        from cirloop.backbones.clip_combiner import ClipCombiner

        return ClipCombiner(self, adapter)


class SimulatedSettings(ModelSettings):
    """No model: vectors drawn from a seed. What `--retrieval simulated` puts in a model's place."""

    type: Literal["simulated"] = "simulated"
    path: str = "simulated"
    """Not used."""
    seed: int = 0
    """The run's."""

    def find(self) -> Path:
        return Path(__file__).parent

    def weights(self) -> str:
        return fingerprint(["simulated-1", self.seed])

    def build(self, adapter: Path | None = None) -> Any:
        from cirloop.backbones.simulated import SimulatedRetrieval

        return SimulatedRetrieval(self)


BackboneConfig = Annotated[
    Blip2Settings
    | ClipCombinerSettings
    | LlavaSettings
    | Qwen2VLSettings
    | Qwen25VLSettings
    | Qwen3VLSettings
    | SimulatedSettings,
    Field(discriminator="type"),
    BeforeValidator(default_type("qwen2_vl")),
]
