"""Qwen2-VL as an embedder (VLM2Vec, arXiv 2410.05160; Qwen2-VL, arXiv 2409.12191).

Embedding = hidden state of the last token, L2-normalised, without `lm_head`. The vision tower is frozen: its output
per image (`encode_images`) is computed once and put where the image placeholders are.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from qwen_vl_utils import fetch_image
from torch import nn
from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

from cirloop.artifacts import fingerprint
from cirloop.backbones.adapter import Adapted
from cirloop.backbones.base import Grid, Item, Tuning, VisionInput
from cirloop.backbones.weights import resolve, weights_digest
from cirloop.types import UserError

if TYPE_CHECKING:
    from PIL import Image

    from cirloop.backbones.config import Qwen2VLSettings

logger = logging.getLogger(__name__)
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def place_vision(vlm: Qwen2VLForConditionalGeneration, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Input embeddings (B, T, D) with the vision tokens in their places, and M-RoPE positions (3, B, T)."""
    ids = inputs["input_ids"]
    embeds = vlm.get_input_embeddings()(ids)
    is_image = ids == vlm.config.image_token_id
    tokens = inputs["vision_tokens"]
    assert int(is_image.sum()) == len(tokens), f"{int(is_image.sum())} image places, {len(tokens)} vision tokens"
    embeds = embeds.masked_scatter(is_image.unsqueeze(-1), tokens.to(embeds.dtype))
    positions, _ = vlm.model.get_rope_index(
        ids, is_image.int(), image_grid_thw=inputs["image_grid_thw"], attention_mask=inputs["attention_mask"]
    )
    return embeds, positions


class Embedder(nn.Module):
    """The trained module: tensors in, unit-norm embeddings out."""

    def __init__(self, vlm: Qwen2VLForConditionalGeneration) -> None:
        super().__init__()
        self.vlm = vlm

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Embeddings (B, D), float32, of right-padded rows."""
        embeds, positions = place_vision(self.vlm, inputs)
        mask = inputs["attention_mask"]
        hidden = self.vlm.model.language_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        last = hidden[torch.arange(len(mask), device=mask.device), mask.sum(1) - 1]
        return F.normalize(last.float(), dim=-1)


class VisionMixin:
    """Images to vision tokens, shared by the embedder and the captioner of this family."""

    vlm: Qwen2VLForConditionalGeneration
    processor: Any
    min_pixels: int
    max_pixels: int

    @property
    def device(self) -> torch.device:
        return next(self.vlm.parameters()).device

    @property
    def vision_key(self) -> str:
        tower = hashlib.sha256()
        for name, weight in sorted(self.vlm.model.visual.state_dict().items()):
            tower.update(name.encode() + weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        image_processor = {k: v for k, v in self.processor.image_processor.to_dict().items() if k != "processor_class"}
        pixels = [self.min_pixels, self.max_pixels, str(self.vlm.dtype)]
        return fingerprint([tower.hexdigest(), fingerprint(_plain(image_processor)), pixels])

    def vision_is_frozen(self) -> bool:
        return not any(p.requires_grad for p in self.vlm.model.visual.parameters())

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image]) -> list[VisionInput]:
        """Vision tokens per image, on the CPU. The pixel budget is checked on what the processor really made."""
        assert self.vision_is_frozen(), "the vision tower is trained: its output may not be kept"
        sized = [
            fetch_image({"image": image, "min_pixels": self.min_pixels, "max_pixels": self.max_pixels})
            for image in images
        ]
        made = self.processor.image_processor(images=sized, do_resize=False, return_tensors="pt")
        grids = made["image_grid_thw"]
        patch = self.processor.image_processor.patch_size
        for grid in grids:
            pixels = int(grid[1] * grid[2]) * patch * patch
            assert pixels <= self.max_pixels, f"an image of {pixels} pixels passed the budget of {self.max_pixels}"
        visual = self.vlm.model.visual
        out = visual(made["pixel_values"].to(self.device, visual.dtype), grid_thw=grids.to(self.device)).pooler_output
        sizes = (grids.prod(-1) // visual.spatial_merge_size**2).tolist()
        return [
            VisionInput(tokens.cpu().clone(), (int(g[0]), int(g[1]), int(g[2])))
            for tokens, g in zip(out.split(sizes), grids.tolist(), strict=True)
        ]

    def num_tokens(self, vision: VisionInput) -> int:
        return len(vision.tokens)

    def tensors(self, texts: Sequence[str], vision: Sequence[VisionInput], side: str) -> dict[str, torch.Tensor]:
        """Tokenised, padded texts whose image placeholders stand once per vision token of `vision`, in order."""
        left = iter(vision)
        full = []
        for text in texts:
            first, *rest = text.split("<|image_pad|>")
            full.append(first + "".join("<|image_pad|>" * self.num_tokens(next(left)) + part for part in rest))
        batch = self.processor.tokenizer(full, padding=True, padding_side=side, return_tensors="pt")
        return {
            "input_ids": batch["input_ids"].to(self.device),
            "attention_mask": batch["attention_mask"].to(self.device),
            "vision_tokens": torch.cat([v.tokens for v in vision]).to(self.device),
            "image_grid_thw": torch.tensor([v.grid for v in vision], device=self.device),
        }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return value if isinstance(value, (int, float, str, bool, type(None))) else str(value)


def load_vlm(path: str, dtype: str, attention: str) -> tuple[Qwen2VLForConditionalGeneration, Any, str]:
    """Model, processor and weights digest."""
    directory = resolve(path, "qwen2_vl")
    loaded: Any = Qwen2VLForConditionalGeneration.from_pretrained(
        directory, dtype=getattr(torch, dtype), attn_implementation=attention, output_loading_info=True
    )
    vlm, info = loaded
    tied = {"lm_head.weight"} if vlm.config.tie_word_embeddings else set()
    missing = sorted({*info["missing_keys"]} - tied)
    if missing:
        raise UserError(f"model path {path!r} lacks weights: {', '.join(missing[:5])} ({len(missing)} in all).")
    vlm.requires_grad_(False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return vlm.to(device).eval(), AutoProcessor.from_pretrained(directory), weights_digest(directory)


class Qwen2VL(VisionMixin, Adapted):
    """The Qwen2-VL embedder."""

    lora_modules = r".*language_model\..*\.({targets})"
    parts = ("model.language_model",)

    def __init__(self, settings: Qwen2VLSettings, adapter: Path | None = None) -> None:
        self.settings = settings
        self.min_pixels, self.max_pixels = settings.min_pixels, settings.max_pixels
        self.vlm, self.processor, self.base_digest = load_vlm(settings.path, settings.dtype, settings.attention)
        self.core, self.base_path = self.vlm, settings.path
        self.module = Embedder(self.vlm)
        if adapter is not None:
            self.load_adapter(adapter)

    @property
    def fingerprint(self) -> str:
        decisive = self.settings.model_dump(mode="json", exclude={"path", "gradient_checkpointing"})
        return fingerprint([self.base_digest, self.adapter_digest, decisive])

    def inputs(self, items: Sequence[Item], vision: Sequence[VisionInput]) -> dict[str, torch.Tensor]:
        return self.tensors([self._text(item) for item in items], vision, side="right")

    def length(self, item: Item, grid: Grid) -> int:
        """Roughly the tokens of an item, to sort by."""
        merged = int(self.vlm.model.visual.spatial_merge_size) ** 2
        return grid[0] * grid[1] * grid[2] // merged + len(self._text(item)) // 4

    def _text(self, item: Item) -> str:
        if item.text is None:
            return f"{IMAGE}\n{self.settings.document_prompt}"
        return f"{IMAGE}\n{self.settings.query_prompt.format(text=item.text)}"

    def text_inputs(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        batch = self.processor.tokenizer(
            list(texts), padding=True, padding_side="right", return_tensors="pt", split_special_tokens=True
        ).to(self.device)
        return {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "vision_tokens": torch.zeros(0, self.vlm.lm_head.in_features, device=self.device),
            "image_grid_thw": torch.zeros(0, 3, dtype=torch.long, device=self.device),
        }

    def make_trainable(self, tuning: Tuning, seed: int) -> None:
        super().make_trainable(tuning, seed)
        if self.settings.gradient_checkpointing:
            self.vlm.gradient_checkpointing_enable({"use_reentrant": False})

    def probe(self) -> torch.Tensor:
        ids = torch.tensor([self.processor.tokenizer.encode("represent the given image")], device=self.device)
        hidden: torch.Tensor = self.vlm.model.language_model(input_ids=ids, use_cache=False).last_hidden_state
        return hidden
