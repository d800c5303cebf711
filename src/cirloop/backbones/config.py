"""Settings of the embedders; the union is the registry."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from cirloop.artifacts.store import fingerprint
from cirloop.backbones.model_settings import (
    EmbedderSettings,
    Qwen3PixelBudget,
    QwenSettings,
    VlmSettings,
)
from cirloop.backbones.weights import resolve
from cirloop.config.base import default_type
from cirloop.io import parse
from cirloop.types import UserError

if TYPE_CHECKING:
    from cirloop.backbones.base import TuningSettings


class Qwen2VLSettings(QwenSettings):
    """Qwen2-VL, used the VLM2Vec way (arXiv 2410.05160): last token, unit norm, an instruction."""

    type: Literal["qwen2_vl"] = "qwen2_vl"
    path: str = "tiny"
    """Model directory or hub name; `tiny` is the embedded model."""


class Qwen25VLSettings(QwenSettings):
    """Qwen2.5-VL (arXiv 2502.13923), used the VLM2Vec way."""

    type: Literal["qwen2_5_vl"] = "qwen2_5_vl"
    path: str = "Qwen/Qwen2.5-VL-3B-Instruct"
    """Model directory or hub name."""


class Qwen3VLSettings(Qwen3PixelBudget, QwenSettings):
    """Qwen3-VL (arXiv 2511.21631), used the VLM2Vec way."""

    type: Literal["qwen3_vl"] = "qwen3_vl"
    path: str = "Qwen/Qwen3-VL-2B-Instruct"
    """Model directory or hub name."""


class LlavaSettings(VlmSettings):
    """LLaVA-1.5, LLaVA-NeXT or LLaVA-OneVision, whichever the model's config.json names, used the
    VLM2Vec way.

    The size of images is the processor's own.
    """

    type: Literal["llava"] = "llava"
    path: str = "llava-hf/llava-v1.6-mistral-7b-hf"
    """Model directory or hub name."""

    def resolve_dir(self) -> Path:
        return resolve(self.path, "llava", "llava_next", "llava_onevision")


class Blip2Settings(EmbedderSettings):
    """BLIP-2 as QuRe uses it (ICML 2025, arXiv 2507.12416): trained Q-Former, 32 vectors per
    gallery image."""

    multi_vector: ClassVar[bool] = True
    type: Literal["blip2"] = "blip2"
    path: str = "Salesforce/blip2-itm-vit-g"
    """Directory or hub name of a `Blip2ForImageTextRetrieval`."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the frozen vision tower; the trained parts are float32."""
    max_tokens: int = Field(32, ge=4, le=512)
    """Most word pieces of a text, with the two special tokens around it."""
    pad_ratio: float | None = Field(None, ge=1)
    """Images are padded until their long side is at most this many short ones, and their middle
    square is taken; QuRe has 1.25 (TargetPad of CLIP4Cir). By default they are squeezed into a
    square, as BLIP-2's processor does."""

    def resolve_dir(self) -> Path:
        return resolve(self.path, "blip-2")


class ClipCombinerSettings(EmbedderSettings):
    """CLIP by open_clip, or any pair of towers in its form, with a combiner of image and text
    (CLIP4Cir, ACM TOMM 2023, arXiv 2308.11485).

    Trained weights are named `combiner...` and, with `train_clip`, `clip...`:
    `training.lr_overrides: {clip: 1.0e-6}` gives CLIP a rate of its own.
    """

    type: Literal["clip_combiner"] = "clip_combiner"
    clip: str = "RN50x4"
    """Architecture, by open_clip's name or as an open_clip model config ending in .json; where
    `path` is a directory and this is left out, the config in it. Weights from a file that were
    trained with QuickGELU, as OpenAI's, need a name ending in -quickgelu; with a tag or a
    repository that is known."""
    path: str = "openai"
    """Weights: a `.safetensors` file; open_clip's tag of published ones, or `hf-hub:NAME`, which
    are fetched from the hub; a directory with such a repository's files; or `random` for none at
    all. Pickles are not read."""
    random_seed: int = Field(0, ge=0)
    """Seed of the weights that are drawn: the combiner's, and CLIP's where `path` is `random`."""
    combiner: Literal["sum", "combiner", "attention_fusion"] = "combiner"
    """How image and text features become a query: their sum, CLIP4Cir's network, or attention
    between tokens."""
    combiner_width: int = Field(4, ge=1)
    """Width of the combiner's hidden layers, in dimensions of the query."""
    project_images: int = Field(0, ge=0)
    """Dimensions of a trained linear projection of image features, the gallery's and the
    references'; queries have as many. 0 = none: a gallery image is its feature, and a text feature
    of another width is projected to the image's."""
    dropout: float = Field(0.5, ge=0, lt=1)
    """Dropout of the combiner in training."""
    pad_ratio: float = Field(1.25, ge=0)
    """Images whose sides differ by more get black bars until they differ by this factor; 0 =
    none."""
    train_clip: bool = False
    """Train both towers of CLIP too; its image features are then no longer kept."""
    cache_texts: bool | None = None
    """Encode each text once a process, alone, and keep its feature in memory while the text tower
    is frozen. None: a text tower of transformers, not CLIP's own, whose last digits differ between
    alone and in a batch."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of CLIP; the combiner is float32, and so is a CLIP that is trained."""

    @model_validator(mode="before")
    @classmethod
    def _names_config(cls, values: Any) -> Any:
        """Take the model config in the directory of the weights, where no other is named."""
        if (
            isinstance(values, dict)
            and "clip" not in values
            and isinstance(values.get("path"), str)
        ):
            config = parse.expand_user(values["path"]) / "open_clip_config.json"
            if config.is_file():
                return {**values, "clip": str(config)}
        return values

    @field_validator("pad_ratio")
    @classmethod
    def _pads(cls, ratio: float) -> float:
        if 0 < ratio < 1:
            raise ValueError(
                f"{ratio} is no ratio of the longer side to the shorter: give 1 or more, or 0 for"
                " none"
            )
        return ratio

    @model_validator(mode="after")
    def _texts_can_be_kept(self) -> ClipCombinerSettings:
        if self.cache_texts and self.train_clip:
            raise ValueError(
                "cache_texts keeps features of a frozen text tower; train_clip trains it"
            )
        if self.cache_texts and self.combiner == "attention_fusion":
            raise ValueError(
                "cache_texts keeps one feature a text; attention_fusion reads those of its tokens"
            )
        return self

    def check_training(self, tuning: TuningSettings) -> None:
        """Raise UserError where no weight would be trained, or an adapter is asked for."""
        super().check_training(tuning)
        if tuning.finetuning not in (None, "full"):
            raise UserError(
                f"training.finetuning {tuning.finetuning!r}: clip_combiner is trained in full;"
                " leave the setting out."
            )
        is_bare = self.combiner == "sum" and not self.project_images
        if is_bare and not self.train_clip and not tuning.trainable_patterns:
            raise UserError(
                "model.combiner `sum` has no weights and CLIP is frozen: nothing to train. Set"
                " model.train_clip or model.project_images, choose the combiner `combiner` or"
                " `attention_fusion`, or train for 0 steps."
            )

    def resolve_dir(self) -> Path:
        """Return the file of the weights, or of the architecture where weights are drawn."""
        from cirloop.backbones.clip_source import find_checkpoint

        checkpoint = find_checkpoint(self.clip, self.path)
        return checkpoint.weights or checkpoint.config

    def weights_digest(self) -> str:
        from cirloop.backbones.clip_source import find_checkpoint

        return find_checkpoint(self.clip, self.path).digest(self.random_seed)

    def path_digests(self) -> dict[str, str | None]:
        """Return the digests; that of the weights covers a JSON config, whatever its path."""
        return {
            **super().path_digests(),
            "clip": None if self.clip.endswith(".json") else self.clip,
        }


class SimulatedSettings(EmbedderSettings):
    """No model: vectors drawn from a seed. What `--retrieval simulated` puts in a model's place."""

    type: Literal["simulated"] = "simulated"
    path: str = "simulated"
    """Not used."""
    seed: int = 0
    """The run's."""

    def resolve_dir(self) -> Path:
        return Path(__file__).parent

    def weights_digest(self) -> str:
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
