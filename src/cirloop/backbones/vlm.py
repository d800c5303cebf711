"""What the vision-language embedders share (VLM2Vec, arXiv 2410.05160).

Embedding = hidden state of the last token, L2-normalised, without `lm_head`.

B rows, T tokens of a row, D dimensions.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import nn

from cirloop.artifacts.store import fingerprint
from cirloop.backbones.adapter import PREFIX, TARGETS, Adapted
from cirloop.backbones.base import Grid, Item, Tuning, VisionInput
from cirloop.backbones.numerics_check import (
    compile_layers,
    prove_embeddings,
    prove_gradient,
    uncompiled,
)
from cirloop.backbones.packing import check_packing, let_sdpa_take_rows, pack
from cirloop.backbones.prompts import IMAGE, PROMPT, filled, fitting
from cirloop.backbones.vision import TOWERS, Inputs, VisionBase, load_vlm
from cirloop.backbones.weights import resolve, resolve_adapter
from cirloop.types import ImageId, UserError

if TYPE_CHECKING:
    from cirloop.backbones.model_settings import VlmSettings

Place = Callable[[Any, Inputs, bool], Inputs]

logger = logging.getLogger(__name__)
SPECIAL = re.compile(r"<\|[^|<>\s]+\|>")
"""What looks like a special token of Qwen's."""
LEGACY_PREFIXES = {
    "model.layers.": "model.language_model.layers.",
    "language_model.model.": "model.language_model.",
}
"""Names of the language model in adapters published for Qwen and LLaVA before transformers 4.52,
and since."""


class Embedder(nn.Module):
    """The trained module: tensors in, unit-norm embeddings out."""

    def __init__(self, vlm: Any, place: Place, sequential: bool = False) -> None:
        super().__init__()
        self.vlm, self.place = vlm, place
        self.sequential = sequential
        """Number image tokens as text is numbered."""
        self.autocast_dtype: torch.dtype | None = None
        """Where some weights of the language model are float32 and others not: the type they are
        used in."""
        self.packed = False
        """Lay rows one after another, without their padding."""

    def forward(self, inputs: Inputs) -> torch.Tensor:
        """Embeddings (B, D), float32, of right-padded rows."""
        mask, placed = inputs["attention_mask"], self.place(self.vlm, inputs, self.sequential)
        if self.packed:
            hidden = self.hidden(
                **pack(placed, self.vlm.model.language_model.config._attn_implementation)
            )
            last = hidden[0, mask.sum(1).cumsum(0) - 1]
        else:
            hidden = self.hidden(**placed)
            last = hidden[torch.arange(len(mask), device=mask.device), mask.sum(1) - 1]
        return F.normalize(last.float(), dim=-1)

    def hidden(self, **given: Any) -> torch.Tensor:
        """Last hidden states (B, T, D) of the language model."""
        device, dtype = self.vlm.lm_head.weight.device.type, self.autocast_dtype
        with torch.autocast(device, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            out: torch.Tensor = self.vlm.model.language_model(
                **given, use_cache=False
            ).last_hidden_state
        return out


class VlmEmbedder(VisionBase, Adapted):
    """An embedder of any family; the family's class says the rest."""

    types: ClassVar[tuple[str, ...]]
    """What config.json may name as `model_type`."""
    image_sign: ClassVar[str]
    """What a prompt format's `{image}` is: the sign of an image with what the family puts around
    it."""
    lora_modules = r".*language_model\..*\.({targets})"
    parts = ("model.language_model",)

    def __init__(self, settings: VlmSettings, adapter: Path | None = None) -> None:
        self.settings, self.format = settings, settings.reads()
        if settings.packed:
            check_packing(str(resolve(settings.path, *self.types)))
        self.vlm, self.processor, self.base_digest = load_vlm(
            settings.path, settings.dtype, settings.attention, self.types, settings.quantization
        )
        self._check_format()
        self.core, self.base_path = self.vlm, settings.path
        self.module = Embedder(self.vlm, self.place, self.format.positions == "sequential")
        if adapter is None and settings.start_adapter is not None:
            self._load_start_adapter(resolve_adapter(settings.start_adapter))
        elif adapter is not None:
            self.load_adapter(adapter)
        if settings.packed:
            let_sdpa_take_rows(self.vlm.model.language_model)
            self.module.packed = True
        if settings.compile:
            compile_layers(self.vlm.model.language_model)
        prove_embeddings(self)

    def _load_start_adapter(self, adapter: Path) -> None:
        self.load_adapter(adapter)
        assert self.lora is not None
        base, path = self.lora.base_model_name_or_path, self.settings.path
        if (
            base and Path(base).name != Path(path).name
        ):  # the same shape does not make it the same base
            logger.warning(
                "the adapter %s was trained on %s, and starts on %s here", adapter, base, path
            )

    @property
    def fingerprint(self) -> str:
        apart = {
            "path",
            "start_adapter",
            "prompt_format",
            "gradient_checkpointing",
        }  # digests stand for files
        settings = self.settings.model_dump(mode="json", exclude=apart)
        return fingerprint([self.base_digest, self.adapter_digest, self.format.digest, settings])

    def _check_format(self) -> None:
        """Raises UserError where the prompt format cannot be read by this model."""
        name, path, family = self.settings.prompt_format, self.settings.path, self.settings.type
        way_out = f"Give another: {', '.join(fitting(family))}, or a .yaml file."
        if self.format.chat_template and not self.processor.chat_template:
            raise UserError(f"model.prompt_format {name}: {path!r} has no chat template. {way_out}")
        written = [self.text(Item(ImageId(""), text)) for text in (None, "")]
        unknown = sorted(
            {sign for text in written for sign in SPECIAL.findall(text)} - {*self.signs}
        )
        if unknown:
            raise UserError(
                f"model.prompt_format {name}: {', '.join(unknown)} are no special tokens of"
                f" {path!r}. {way_out}"
            )
        if any(text.count(self.processor.image_token) != 1 for text in written):
            raise UserError(
                f"model.prompt_format {name}: a query and a document must hold one image, {IMAGE}"
                f" or {self.processor.image_token}. {way_out}"
            )

    def inputs(self, items: Sequence[Item], vision: Sequence[VisionInput]) -> Inputs:
        return self.tensors([self.text(item) for item in items], vision, side="right")

    def image_length(self, grid: Grid) -> int:
        """Vision tokens of an image."""
        raise NotImplementedError

    def length(self, item: Item, grid: Grid) -> int:
        """Tokens of an item."""
        return self._num_tokens(self.text(item)) - 1 + self.image_length(grid)

    @cached_property
    def _num_tokens(self) -> Callable[[str], int]:
        """Of a text as `tensors` reads it, with one place for its image."""
        return lru_cache(4096)(lambda text: len(self.tokenized([text], "right")["input_ids"][0]))

    def text(self, item: Item) -> str:
        """What the model reads, by the prompt format; what looks like a special token in an item's
        values is words."""
        frame = self._document if item.text is None else self._query
        if not self.format.chat_template:
            pieces = re.split(f"({self._signs.pattern})", frame.replace(IMAGE, self.image_sign))
            return "".join(
                piece if at % 2 else self._filled(piece, item) for at, piece in enumerate(pieces)
            )
        before, after = (self._filled(piece, item) for piece in frame.split(IMAGE))
        content = [
            {"type": "text", "text": before},
            {"type": "image"},
            {"type": "text", "text": after},
        ]
        turn = {"role": "user", "content": [part for part in content if part.get("text") != ""]}
        text: str = self.processor.apply_chat_template(
            [turn], add_generation_prompt=True, tokenize=False
        )
        return text

    def _filled(self, piece: str, item: Item) -> str:
        """A piece between special tokens with the item's values. Broken up as a whole: a value must
        not make a special token with what stands beside it."""
        return self.words(filled(piece, item.text or "", item.category or self.format.category))

    @cached_property
    def _query(self) -> str:
        """The format's query with its instruction. One of the settings is words."""
        own = self.settings.query_prompt
        return self.format.query.replace(
            PROMPT, self.format.query_prompt if own is None else self.words(own)
        )

    @cached_property
    def _document(self) -> str:
        own = self.settings.document_prompt
        return self.format.document.replace(
            PROMPT, self.format.document_prompt if own is None else self.words(own)
        )

    def vision_width(self) -> int:
        """Numbers per vision token."""
        return int(self.vlm.config.text_config.hidden_size)

    def text_inputs(self, texts: Sequence[str]) -> Inputs:
        batch = self.processor.tokenizer(
            list(texts),
            padding=True,
            padding_side="right",
            return_tensors="pt",
            split_special_tokens=True,
        ).to(self.device)
        return {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "vision_tokens": torch.zeros(0, self.vision_width(), device=self.device),
            "image_grid_thw": torch.zeros(0, 3, dtype=torch.long, device=self.device),
        }

    def make_trainable(self, tuning: Tuning, seed: int) -> None:
        self.settings.check_training(tuning)
        if self.lora is not None:
            self._check_same_lora(self.lora, tuning)
        super().make_trainable(tuning, seed)
        self._set_autocast()
        if self.settings.gradient_checkpointing:
            self.vlm.gradient_checkpointing_enable({"use_reentrant": False})
        prove_gradient(self)

    def _check_same_lora(self, lora: LoraConfig, tuning: Tuning) -> None:
        """Raises UserError where the LoRA that goes on being trained is not what the settings ask
        for."""
        names = [name for name, _ in self.core.named_parameters() if "language_model." in name]
        there = {part for name in names for part in name.split(".")}
        adapted = sorted(
            {name.split(".lora_A.")[0].split(".")[-1] for name in names if ".lora_A." in name}
        )
        pairs = {
            "r": (lora.r, tuning.lora.r),
            "alpha": (lora.lora_alpha, tuning.lora.alpha),
            "dropout": (lora.lora_dropout, tuning.lora.dropout),
            "target_modules": (
                ", ".join(adapted),
                ", ".join(sorted(there & {*tuning.lora.target_modules})),
            ),
        }
        differ = [
            f"{name} {has}, not {wanted}" for name, (has, wanted) in pairs.items() if has != wanted
        ]
        if differ:
            raise UserError(
                "the adapter to go on from does not have training.lora's settings:"
                f" {'; '.join(differ)}. Set training.lora to the adapter's, or start without it."
            )

    def _check_parts(self, parts: tuple[str, ...]) -> None:
        super()._check_parts(parts)
        named = [name for name, _ in self.core.named_parameters() if name.startswith(TOWERS)]
        seen = [part for part in parts if any(re.match(part, name) for name in named)]
        if seen:
            raise UserError(
                f"training.trainable_patterns: {', '.join(seen)} reach the vision tower, which"
                " stays frozen here: its output per image is kept. Name parts of"
                " model.language_model."
            )

    def map_legacy_key(self, name: str) -> str:
        for legacy, prefix in LEGACY_PREFIXES.items():
            if name.startswith(PREFIX + legacy):
                return PREFIX + prefix + name.removeprefix(PREFIX + legacy)
        return name

    def _inject(self, lora: LoraConfig, what: str = TARGETS) -> None:
        super()._inject(lora, what)
        names = [name for name, _ in self.core.named_parameters() if "lora_" in name]
        outside = [name for name in names if "language_model." not in name]
        if outside:
            raise UserError(
                f"LoRA outside the language model of {self.base_path!r}: {len(outside)} of"
                f" {len(names)} weights, the first {outside[0]}. The vision tower stays frozen"
                " here. Merge such an adapter into its base (PEFT's merge_and_unload) and give the"
                " merged model as model.path."
            )

    def probe(self) -> torch.Tensor:
        ids = torch.tensor(
            [self.processor.tokenizer.encode("represent the given image")], device=self.device
        )
        self._set_autocast()
        with uncompiled():
            return self.module.hidden(input_ids=ids)

    def _set_autocast(self) -> None:
        """Parts trained in full are float32: with others of half precision they need autocast."""
        named = self.vlm.model.language_model.named_parameters()
        types = {p.dtype for name, p in named if "lora_" not in name and p.is_floating_point()}
        self.module.autocast_dtype = next(iter(types - {torch.float32})) if len(types) > 1 else None
