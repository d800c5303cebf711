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
from peft import (
    LoraConfig,
    PeftConfig,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from qwen_vl_utils import fetch_image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

from cirloop.artifacts import file_digest, fingerprint
from cirloop.backbones.base import Grid, Item, LoraSettings, VisionInput
from cirloop.backbones.weights import resolve, weights_digest
from cirloop.types import UserError

if TYPE_CHECKING:
    from PIL import Image

    from cirloop.backbones.config import Qwen2VLSettings

logger = logging.getLogger(__name__)
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."


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


class Qwen2VL(VisionMixin):
    """The Qwen2-VL embedder."""

    def __init__(self, settings: Qwen2VLSettings, adapter: Path | None = None) -> None:
        self.settings = settings
        self.min_pixels, self.max_pixels = settings.min_pixels, settings.max_pixels
        self.vlm, self.processor, self.base_digest = load_vlm(settings.path, settings.dtype, settings.attention)
        self.module = Embedder(self.vlm)
        self.lora: LoraConfig | None = None
        self.adapter_digest = ""
        if adapter is not None:
            self._load_adapter(adapter)

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

    def add_lora(self, settings: LoraSettings, seed: int) -> None:
        """Put a fresh LoRA on the language model; with one loaded already, make that one trainable."""
        if self.lora is None:
            torch.manual_seed(seed)
            self.lora = LoraConfig(
                r=settings.rank,
                lora_alpha=settings.alpha,
                lora_dropout=settings.dropout,
                target_modules=rf".*language_model\..*\.({'|'.join(settings.targets)})",
                base_model_name_or_path=self.settings.path,
            )
            self._inject(self.lora)
        for name, parameter in self.vlm.named_parameters():
            parameter.requires_grad_("lora_" in name)
        if self.settings.gradient_checkpointing:
            self.vlm.gradient_checkpointing_enable({"use_reentrant": False})
        assert self.vision_is_frozen() and self.trainable()

    def _inject(self, lora: LoraConfig) -> None:
        """LoRA modules in float32, whatever the base's dtype."""
        inject_adapter_in_model(lora, self.vlm)
        for name, parameter in self.vlm.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.vlm.named_parameters() if p.requires_grad}

    def adapter_state(self) -> dict[str, torch.Tensor]:
        """The adapter by PEFT's names, as `PeftModel.from_pretrained` expects them."""
        state = get_peft_model_state_dict(self.vlm, save_embedding_layers=False)
        return {PREFIX + name: value.detach().cpu().contiguous() for name, value in state.items()}

    def save_adapter(self, directory: Path) -> None:
        """Write the adapter as PEFT does, and check that what was written is what is in memory."""
        assert self.lora is not None
        directory.mkdir(parents=True, exist_ok=True)
        state = self.adapter_state()
        empty = [k for k, v in state.items() if v.numel() == 0]
        assert state and not empty, f"empty adapter tensors: {empty[:3]}"
        save_file(state, directory / ADAPTER_WEIGHTS)
        self.lora.inference_mode = True
        self.lora.save_pretrained(str(directory))
        written = load_file(directory / ADAPTER_WEIGHTS)
        assert written.keys() == state.keys() and all(torch.equal(written[k], state[k]) for k in state)

    def _load_adapter(self, directory: Path) -> None:
        lora = PeftConfig.from_pretrained(str(directory))
        assert isinstance(lora, LoraConfig)
        state = load_file(directory / ADAPTER_WEIGHTS)
        self._inject(lora)
        expected = self.adapter_state().keys()
        if state.keys() != expected:
            odd = sorted(state.keys() ^ expected)
            raise UserError(
                f"adapter {directory} does not fit the model {self.settings.path!r}: {len(odd)} keys differ, {odd[:3]}"
            )
        set_peft_model_state_dict(self.vlm, {name.removeprefix(PREFIX): value for name, value in state.items()})
        loaded = self.adapter_state()
        assert all(torch.equal(loaded[k], state[k].to(loaded[k].dtype)) for k in state), "adapter did not load"
        assert any(v.any() for k, v in state.items() if "lora_B" in k), f"adapter {directory} changes nothing"
        self.vlm.requires_grad_(False)
        self.lora = lora
        self.adapter_digest = file_digest(directory / ADAPTER_WEIGHTS)
        self._assert_adapter_acts()

    @torch.no_grad()
    def _assert_adapter_acts(self) -> None:
        ids = torch.tensor([self.processor.tokenizer.encode("represent the given image")], device=self.device)
        model = self.vlm.model.language_model
        adapted = model(input_ids=ids, use_cache=False).last_hidden_state
        layers = [m for m in self.vlm.modules() if isinstance(m, BaseTunerLayer)]
        for layer in layers:
            layer.enable_adapters(False)
        base = model(input_ids=ids, use_cache=False).last_hidden_state
        for layer in layers:
            layer.enable_adapters(True)
        self.vlm.requires_grad_(False)
        assert not torch.equal(adapted, base), "the adapter loaded but changes no output"
