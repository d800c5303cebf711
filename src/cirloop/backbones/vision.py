"""Loading a vision-language model, and its images as tokens: what the embedder and the captioner of
a family share.

The vision tower is frozen: its output per image (`encode_images`) is computed once and put where
the image placeholders are. A family's file says how its processor is called, what the tower gives,
and what the language model is told about places and positions.

B rows, T tokens of a row, D dimensions.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

from cirloop.artifacts.store import fingerprint
from cirloop.backbones.base import VisionInput
from cirloop.backbones.patches import use_product
from cirloop.backbones.weights import resolve, weights_digest
from cirloop.types import UserError

if TYPE_CHECKING:
    from PIL import Image

TOWERS = (
    "model.visual",
    "model.vision_tower",
    "model.multi_modal_projector",
    "model.image_newline",
)
"""Where the families keep what makes vision tokens of pixels."""
Inputs = dict[str, Any]


def load_vlm(
    path: str,
    dtype: str,
    attention: str,
    types: tuple[str, ...] = ("qwen2_vl",),
    quantization: str = "none",
) -> tuple[Any, Any, str]:
    """Model, processor and weights digest. Raises UserError where the files or the machine are not
    up to it."""
    directory = resolve(path, *types)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    four_bit = (
        {"quantization_config": _nf4(dtype), "device_map": {"": device}}
        if quantization == "nf4"
        else {}
    )
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            directory,
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported, and refused by name
            trust_remote_code=False,
            use_safetensors=True,
            **four_bit,
        )
        processor = AutoProcessor.from_pretrained(directory, trust_remote_code=False)
    except (SafetensorError, OSError, ValueError, ImportError) as error:
        raise UserError(
            f"model path {path!r} cannot be loaded: {error}\nRestore the files, or download them"
            " again."
        ) from None
    vlm, info = loaded
    tied = {"lm_head.weight"} if vlm.config.tie_word_embeddings else set()
    missing = sorted({*info["missing_keys"]} - tied)
    if missing:
        raise UserError(
            f"model path {path!r} lacks weights: {', '.join(missing[:5])} ({len(missing)} in all)."
        )
    odd = [
        f"{name} {list(has)}, not {list(needs)}"
        for name, has, needs in sorted(info["mismatched_keys"])
    ]
    if odd:
        raise UserError(
            f"model path {path!r}: {len(odd)} weights do not fit config.json: {'; '.join(odd[:3])}."
        )
    there, needed = (
        processor.tokenizer.convert_tokens_to_ids(processor.image_token),
        vlm.config.image_token_id,
    )
    if there != needed:
        raise UserError(
            f"model path {path!r}: the tokenizer's {processor.image_token!r} is {there}, but the"
            f" model's image token is {needed}. Give the tokenizer that belongs to the model."
        )
    vlm.requires_grad_(False)
    vlm = (vlm if four_bit else vlm.to(device)).eval()
    use_product(vlm, path)
    return vlm, processor, weights_digest(directory)


def _nf4(dtype: str) -> BitsAndBytesConfig:
    """4 bits as QLoRA has them (arXiv 2305.14314), the vision tower left as it is."""
    lacks = (
        [] if find_spec("bitsandbytes") else ["the package bitsandbytes (pip install bitsandbytes)"]
    )
    lacks += [] if torch.cuda.is_available() else ["a CUDA GPU"]
    if lacks:
        raise UserError(
            f"model.quantization nf4 needs {' and '.join(lacks)}. Or set model.quantization none."
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
        llm_int8_skip_modules=[*TOWERS, "lm_head"],
    )


class VisionBase:
    """Images to vision tokens and those to their places: what embedder and captioner of a family
    share."""

    vlm: Any
    processor: Any

    @staticmethod
    def place(vlm: Any, inputs: Inputs, sequential: bool = False) -> Inputs:
        """What the language model is called with for `tensors(...)`; its own embeddings (B, T, D)
        among it. With `sequential`, image tokens are numbered as text is."""
        raise NotImplementedError

    def vision_settings(self) -> list[Any]:
        """What decides `encode_images` besides the tower's weights and the image processor."""
        raise NotImplementedError

    def prepare_images(self, images: Sequence[Image.Image]) -> Any:
        """What the image processor makes of images, without the model's weights."""
        raise NotImplementedError

    def make_tokens(self, images: Sequence[Image.Image], prepared: Any) -> list[VisionInput]:
        """Vision tokens per image, on the model's device, from `prepare_images`' output."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.vlm.parameters()).device
        return device

    @cached_property
    def vision_key(self) -> str:
        tower = hashlib.sha256()
        named = {n: w for n, w in self.vlm.state_dict().items() if n.startswith(TOWERS)}
        for name, weight in sorted((n.removeprefix("model.visual."), w) for n, w in named.items()):
            tower.update(
                name.encode()
                + weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
            )
        image_processor = {
            k: v
            for k, v in self.processor.image_processor.to_dict().items()
            if k != "processor_class"
        }
        return fingerprint(
            [tower.hexdigest(), fingerprint(plain(image_processor)), self.vision_settings()]
        )

    def vision_is_frozen(self) -> bool:
        return not any(
            p.requires_grad for n, p in self.vlm.named_parameters() if n.startswith(TOWERS)
        )

    @torch.no_grad()
    def encode_images(
        self, images: Sequence[Image.Image], prepared: Any = None
    ) -> list[VisionInput]:
        """Vision tokens per image, on the CPU. What the processor really made is checked."""
        assert self.vision_is_frozen(), "the vision tower is trained: its output may not be kept"
        ready = self.prepare_images(images) if prepared is None else prepared
        return [
            VisionInput(made.tokens.cpu().clone(), made.grid)
            for made in self.make_tokens(images, ready)
        ]

    def num_tokens(self, vision: VisionInput) -> int:
        return len(vision.tokens)

    @cached_property
    def signs(self) -> list[str]:
        """The special tokens, such as the sign for an image, longest first."""
        added = self.processor.tokenizer.added_tokens_decoder.values()
        signs = {token.content for token in added if token.special} | {self.processor.image_token}
        return sorted(signs, key=lambda sign: (-len(sign), sign))

    @cached_property
    def _signs(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self.signs)))

    def words(self, text: str) -> str:
        """A user's text with every special token in it, such as the sign for an image, broken up
        into words."""
        return self._signs.sub(lambda sign: f"{sign[0][0]} {sign[0][1:]}", text)

    def tensors(self, texts: Sequence[str], vision: Sequence[VisionInput], side: str) -> Inputs:
        """Tokenised, padded texts whose image placeholders stand once per vision token of `vision`,
        in order."""
        left, sign = iter(vision), self.processor.image_token
        full = []
        for text in texts:
            first, *rest = text.split(sign)
            full.append(first + "".join(sign * self.num_tokens(next(left)) + part for part in rest))
        batch = self.tokenized(full, side)
        return {
            "input_ids": batch["input_ids"].to(self.device),
            "attention_mask": batch["attention_mask"].to(self.device),
            "vision_tokens": torch.cat([v.tokens for v in vision]).to(self.device),
            "image_grid_thw": torch.tensor([v.grid for v in vision], device=self.device),
        }

    def tokenized(self, texts: Sequence[str], side: str) -> Any:
        """Ids and mask of texts, padded on a side."""
        bos = self.processor.tokenizer.bos_token
        return self.processor.tokenizer(
            list(texts),
            padding=True,
            padding_side=side,
            return_tensors="pt",
            add_special_tokens=not (
                bos and texts[0].startswith(bos)
            ),  # a chat template that writes it itself
        )


def embed_with(vlm: Any, inputs: Inputs) -> torch.Tensor:
    """Input embeddings (B, T, D) with the vision tokens in their places."""
    ids, tokens = inputs["input_ids"], inputs["vision_tokens"]
    embeds: torch.Tensor = vlm.get_input_embeddings()(ids)
    is_image = ids == vlm.config.image_token_id
    assert int(is_image.sum()) == len(tokens), (
        f"{int(is_image.sum())} image places, {len(tokens)} vision tokens"
    )
    return embeds.masked_scatter(is_image.unsqueeze(-1), tokens.to(embeds.dtype))


def plain(value: Any) -> Any:
    """A configuration as JSON can hold it; what it cannot hold, as text."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    return value if isinstance(value, (int, float, str, bool, type(None))) else str(value)
