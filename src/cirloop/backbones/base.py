"""What every embedder is to the rest of the program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import Field

from cirloop.config.base import Settings
from cirloop.types import ImageId

if TYPE_CHECKING:
    import torch
    from PIL import Image


@dataclass(frozen=True, slots=True)
class Item:
    """What is embedded: an image with a text is a composed query, an image alone a gallery
    image."""

    image: ImageId
    text: str | None = None
    category: str | None = None
    """What kind of thing a query is about, where its data set says so; some prompt formats read
    it."""


def each_once(items: Sequence[Item]) -> tuple[list[Item], list[int]]:
    """The different ones of `items`, in order, and per item its place among them."""
    place = {item: at for at, item in enumerate(dict.fromkeys(items))}
    return [*place], [place[item] for item in items]


Grid = tuple[int, int, int]
"""Patches of an image: frames, height, width."""


@dataclass(frozen=True, slots=True)
class VisionInput:
    """One image as the language model sees it: `tokens` (T, D), and the patch grid (frames, height,
    width)."""

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


class Tuning(Protocol):
    """The settings of training that say what is trained; `training.config` has them."""

    @property
    def finetuning(self) -> str | None: ...

    @property
    def lora(self) -> LoraSettings: ...

    @property
    def trainable_patterns(self) -> tuple[str, ...]: ...


class Backbone(Protocol):
    """A vision-language embedder. Queries are of unit norm (B, D); gallery images too, or (B, M,
    D): M vectors of one image, of which the one most similar to the query counts
    (`retrieval.similarity`). A call of `module` gets queries or gallery images, never both."""

    @property
    def fingerprint(self) -> str:
        """Of base weights, adapter weights and everything else that decides an embedding."""
        ...

    @property
    def vision_key(self) -> str:
        """Of what decides `encode_images`: frozen weights, processor, pixel budget, dtype."""
        ...

    @property
    def module(self) -> torch.nn.Module:
        """Takes `inputs(...)`, gives unit-norm embeddings."""
        ...

    @property
    def device(self) -> torch.device: ...

    def prepare_images(self, images: Sequence[Image.Image]) -> Any:
        """What the image processor makes of images. Touches no weights: threads do it ahead of the
        tower."""
        ...

    def encode_images(
        self, images: Sequence[Image.Image], prepared: Any = None
    ) -> list[VisionInput]:
        """What the frozen part makes of images, on the CPU and kept on disk; pixels where no part
        is frozen. `prepared` is what `prepare_images` made of the same images, if that is done
        already."""
        ...

    def inputs(self, items: Sequence[Item], vision: Sequence[VisionInput]) -> dict[str, Any]: ...

    def text_inputs(self, texts: Sequence[str]) -> dict[str, Any]:
        """Texts alone, without a prompt. A text is words, also where it looks like the sign for an
        image."""
        ...

    def length(self, item: Item, grid: Grid) -> int:
        """Places that `inputs` gives an item alone. Items of one length need no padding beside each
        other."""
        ...

    def make_trainable(self, tuning: Tuning, seed: int) -> None: ...

    def trainable(self) -> dict[str, torch.nn.Parameter]: ...

    def save_adapter(self, directory: Path) -> None: ...
