"""The interface of embedders, and the values they exchange with the rest of the program."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, TypeVar

from pydantic import Field

from cirloop.config.base import Settings
from cirloop.types import ImageId

if TYPE_CHECKING:
    import torch
    from PIL import Image

H = TypeVar("H", bound=Hashable)
Grid = tuple[int, int, int]
"""Patches of an image: frames, height, width."""
Inputs: TypeAlias = dict[str, Any]
"""Tensors by name, as an embedder's module or a language model takes them."""
PreparedImages: TypeAlias = Any
"""Output of an image processor: a tensor, or a mapping of tensors, by family."""
VisionLanguageModel: TypeAlias = Any
"""An image-text-to-text model of transformers: untyped, with other attributes in each family."""


@dataclass(frozen=True, slots=True)
class EmbedInput:
    """An input to embed: an image with a text is a composed query, an image alone a gallery
    image."""

    image: ImageId
    text: str | None = None
    category: str | None = None
    """Category of a query, where its data set has one; some prompt formats read it."""


def deduplicate(items: Sequence[H]) -> tuple[list[H], list[int]]:
    """Return the unique items in order, and the index among them of each of `items`."""
    index_of = {item: index for index, item in enumerate(dict.fromkeys(items))}
    return [*index_of], [index_of[item] for item in items]


@dataclass(frozen=True, slots=True)
class ImageFeatures:
    """An image as the language model sees it: vision tokens (T, D) and the patch grid."""

    tokens: torch.Tensor
    grid: Grid


class LoraSettings(Settings):
    """The trainable part (LoRA, arXiv 2106.09685). Defaults are VLM2Vec's."""

    r: int = Field(16, ge=1)
    """Rank of the two factors."""
    alpha: int = Field(64, ge=1)
    """What the adapter adds is multiplied by alpha / r."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Share of an adapter's inputs dropped in training."""
    target_modules: tuple[str, ...] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    """Module names of the language model that get an adapter. The vision tower stays as it is."""
    dtype: Literal["float32", "base"] = "float32"
    """What adapters compute in while they are trained. `base`: in `model.dtype`, with float32
    copies for the optimizer, which are what is saved: in bfloat16 less memory per token and faster,
    see docs/performance.md."""


class TuningSettings(Protocol):
    """The training settings that say which weights are trained; `training.config` has them."""

    @property
    def finetuning(self) -> str | None: ...

    @property
    def lora(self) -> LoraSettings: ...

    @property
    def trainable_patterns(self) -> tuple[str, ...]: ...


class ModelWithDtype(Protocol):
    """Settings of a model, with its dtype."""

    @property
    def dtype(self) -> str: ...


class ImageEncoder(Protocol):
    """A frozen vision tower, whose output per image can be kept on disk."""

    @property
    def vision_key(self) -> str:
        """Digest of what decides `encode_images`: frozen weights, processor, pixels, dtype."""
        ...

    def prepare_images(self, images: Sequence[Image.Image]) -> PreparedImages:
        """Run the image processor. Uses no weights: threads do it ahead of the tower."""
        ...

    def encode_images(
        self, images: Sequence[Image.Image], prepared: PreparedImages | None = None
    ) -> Sequence[ImageFeatures]:
        """Compute the output of the frozen part, on the device; pixels where no part is frozen.

        `prepared` is the output of `prepare_images` for the same images, where there is one.
        """
        ...


class Backbone(ImageEncoder, Protocol):
    """A vision-language embedder.

    Queries are of unit norm (B, D). Gallery images are too, or (B, M, D): M vectors of one image,
    of which the one most similar to the query counts (`backbones.similarity`). A call of `module`
    gets queries or gallery images, never both.
    """

    @property
    def fingerprint(self) -> str:
        """Digest of base weights, adapter weights and all else that decides an embedding."""
        ...

    @property
    def module(self) -> torch.nn.Module:
        """The module that takes `inputs(...)` and returns unit-norm embeddings."""
        ...

    @property
    def device(self) -> torch.device: ...

    @property
    def settings(self) -> ModelWithDtype: ...

    @property
    def root_module(self) -> torch.nn.Module:
        """The module that holds the weights; their names start there."""
        ...

    def inputs(self, items: Sequence[EmbedInput], vision: Sequence[ImageFeatures]) -> Inputs: ...

    def text_inputs(self, texts: Sequence[str]) -> Inputs:
        """Return the inputs of texts alone, without a prompt; special tokens in them are words."""
        ...

    def sequence_length(self, item: EmbedInput, grid: Grid) -> int:
        """Count the tokens of an item alone.

        Items of one length need no padding in a common batch.
        """
        ...

    def make_trainable(self, tuning: TuningSettings, seed: int) -> None: ...

    def trainable(self) -> dict[str, torch.nn.Parameter]: ...

    def save_adapter(self, directory: Path) -> None: ...
