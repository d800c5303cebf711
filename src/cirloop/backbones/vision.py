"""Loading of vision-language models, and their images as tokens, for embedder and captioner.

The vision tower is frozen: its output per image (`encode_images`) is computed once and put where
the image placeholders are. A family's file says how its processor is called, what the tower
returns, and which inputs the language model takes.

B rows, T tokens of a row, D dimensions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

from cirloop.artifacts.store import fingerprint
from cirloop.backbones.base import ImageFeatures, Inputs, PreparedImages, VisionLanguageModel
from cirloop.backbones.patches import use_product
from cirloop.backbones.special_tokens import Processor, escape_special_tokens, special_tokens
from cirloop.backbones.transfer import to_device
from cirloop.backbones.weights import load_pretrained, loading_errors, weights_digest
from cirloop.types import UserError

if TYPE_CHECKING:
    from PIL import Image

VISION_PREFIXES = (
    "model.visual",
    "model.vision_tower",
    "model.multi_modal_projector",
    "model.image_newline",
)
"""Prefixes of the weights that make vision tokens of pixels, over all families."""
WAY_OUT = "Restore the files, config.json among them, or download them again."
Json: TypeAlias = dict[str, "Json"] | int | float | str | bool | None


def load_vlm(
    path: str, directory: Path, dtype: str, attention: str, quantization: str = "none"
) -> tuple[VisionLanguageModel, Processor, str]:
    """Load the model `path` of `directory`, its processor and the digest of its weights.

    Raises UserError where the files are not complete and consistent, or the machine lacks what
    `quantization` needs.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "attn_implementation": attention}
    if quantization == "nf4":
        options["quantization_config"] = _nf4(dtype)
        options["device_map"] = {"": torch.cuda.current_device()}  # threads load it
    subject = f"model path {path!r}"
    vlm = load_pretrained(AutoModelForImageTextToText, directory, subject, WAY_OUT, **options)
    with loading_errors(subject, WAY_OUT):
        processor = AutoProcessor.from_pretrained(directory, trust_remote_code=False)
    _require_image_token(path, vlm, processor)
    vlm = (vlm if quantization == "nf4" else vlm.to(device)).eval()
    use_product(vlm, path)
    return vlm, processor, weights_digest(directory)


def _require_image_token(path: str, vlm: VisionLanguageModel, processor: Processor) -> None:
    """Raise UserError where tokenizer and model do not have the same image token."""
    token_id = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    expected = vlm.config.image_token_id
    if token_id != expected:
        raise UserError(
            f"model path {path!r}: the tokenizer's {processor.image_token!r} is {token_id}, but the"
            f" model's image token is {expected}. Give the tokenizer that belongs to the model."
        )


def _nf4(dtype: str) -> BitsAndBytesConfig:
    """Return the configuration of QLoRA's 4 bits (arXiv 2305.14314), without the vision tower."""
    lacks = []
    if not find_spec("bitsandbytes"):
        lacks.append("the package bitsandbytes (pip install bitsandbytes)")
    if not torch.cuda.is_available():
        lacks.append("a CUDA GPU")
    if lacks:
        raise UserError(
            f"model.quantization nf4 needs {' and '.join(lacks)}. Or set model.quantization none."
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
        llm_int8_skip_modules=[*VISION_PREFIXES, "lm_head"],
    )


def tower_digest(weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return the digest of a vision tower's names and weights, in order."""
    digest = hashlib.sha256()
    for name, weight in weights:
        values = weight.detach().cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(name.encode() + values.numpy().tobytes())
    return digest.hexdigest()


class VisionBase:
    """Vision tokens of images and their places in a prompt, for embedder and captioner."""

    vlm: VisionLanguageModel
    processor: Processor

    @staticmethod
    def language_model_inputs(vlm: VisionLanguageModel, inputs: Inputs) -> Inputs:
        """Return the language model's inputs for `collate(...)`, with embeddings (B, T, D)."""
        raise NotImplementedError

    def positions(self, batch: Inputs) -> Inputs:
        """Return the positions of a batch's tokens, on the host, where the model does not number
        them by itself."""
        return {}

    def vision_settings(self) -> list[Any]:
        """Return what decides `encode_images` besides the tower's weights and the processor."""
        raise NotImplementedError

    def prepare_images(self, images: Sequence[Image.Image]) -> PreparedImages:
        """Run the image processor, which needs no weights of the model."""
        raise NotImplementedError

    def compute_tokens(
        self, images: Sequence[Image.Image], prepared: PreparedImages
    ) -> list[ImageFeatures]:
        """Compute vision tokens per image, on the model's device, from `prepare_images`' output."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.vlm.parameters()).device
        return device

    @cached_property
    def vision_key(self) -> str:
        weights = self.vlm.state_dict().items()
        tower = ((n.removeprefix("model.visual."), w) for n, w in weights if _is_vision(n))
        image_processor = self.processor.image_processor.to_dict()
        image_processor.pop("processor_class", None)
        return fingerprint(
            [
                tower_digest(sorted(tower)),
                fingerprint(to_json(image_processor)),
                self.vision_settings(),
            ]
        )

    def vision_is_frozen(self) -> bool:
        """Return whether no weight of the vision tower is trained."""
        return not any(p.requires_grad for n, p in self.vlm.named_parameters() if _is_vision(n))

    @torch.no_grad()
    def encode_images(
        self, images: Sequence[Image.Image], prepared: PreparedImages | None = None
    ) -> list[ImageFeatures]:
        """Compute vision tokens per image, on the device. Checks what the processor really made."""
        assert self.vision_is_frozen(), "the vision tower is trained: its output may not be kept"
        ready = self.prepare_images(images) if prepared is None else prepared
        return self.compute_tokens(images, ready)

    def num_tokens(self, vision: ImageFeatures) -> int:
        """Count the placeholders of an image in the prompt."""
        return len(vision.tokens)

    @cached_property
    def special_tokens(self) -> list[str]:
        """The processor's special tokens, such as the image placeholder, longest first."""
        return special_tokens(self.processor)

    def escape(self, text: str) -> str:
        """Break up every special token in a user's text, so that it is read as words."""
        return escape_special_tokens(text, self.special_tokens)

    def collate(self, texts: Sequence[str], vision: Sequence[ImageFeatures], side: str) -> Inputs:
        """Return a batch on the device: texts padded on `side`, with the tokens of their images.

        `vision` are the images of all texts, in order.
        """
        images = {
            "vision_tokens": torch.cat([v.tokens for v in vision]),
            "image_grid_thw": torch.tensor([v.grid for v in vision]),
        }
        return self.on_device(self.tokenize_with_images(texts, vision, side) | images)

    def on_device(self, batch: Inputs) -> Inputs:
        """Move a batch from the host, with the positions of its tokens.

        What has to be read back of it is read before: the host would have to wait for all that a
        GPU was asked before.
        """
        num_places = int((batch["input_ids"] == self.vlm.config.image_token_id).sum())
        num_tokens = len(batch["vision_tokens"])
        assert num_places == num_tokens, f"{num_places} image places, {num_tokens} vision tokens"
        whole = batch | self.positions(batch)
        return {name: to_device(tensor, self.device) for name, tensor in whole.items()}

    def tokenize_with_images(
        self, texts: Sequence[str], vision: Sequence[ImageFeatures], side: str
    ) -> Inputs:
        """Return ids and mask, on the host; repeat each image placeholder once per vision
        token."""
        remaining = iter(vision)
        placeholder = self.processor.image_token
        expanded = []
        for text in texts:
            first, *rest = text.split(placeholder)
            parts = [placeholder * self.num_tokens(next(remaining)) + part for part in rest]
            expanded.append(first + "".join(parts))
        batch = self.tokenize(expanded, side)
        return {name: batch[name] for name in ("input_ids", "attention_mask")}

    def tokenize(self, texts: Sequence[str], side: str) -> Inputs:
        """Return ids and mask of texts, padded on `side`."""
        bos = self.processor.tokenizer.bos_token
        # A chat template may have written the start token itself.
        has_bos = bool(bos) and texts[0].startswith(bos)
        batch: Inputs = self.processor.tokenizer(
            list(texts),
            padding=True,
            padding_side=side,
            return_tensors="pt",
            add_special_tokens=not has_bos,
        )
        return batch


def _is_vision(name: str) -> bool:
    return name.startswith(VISION_PREFIXES)


def merge_vision_tokens(vlm: VisionLanguageModel, inputs: Inputs) -> torch.Tensor:
    """Return input embeddings (B, T, D) with the vision tokens in the places of placeholders."""
    ids = inputs["input_ids"]
    tokens = inputs["vision_tokens"]
    embeds: torch.Tensor = vlm.get_input_embeddings()(ids)
    is_image = ids == vlm.config.image_token_id
    return embeds.masked_scatter(is_image.unsqueeze(-1), tokens.to(embeds.dtype))


def to_json(value: object) -> Json:
    """Convert a configuration to JSON values; what JSON cannot hold becomes text."""
    if isinstance(value, dict):
        return {str(key): to_json(entry) for key, entry in value.items()}
    return value if isinstance(value, (int, float, str, bool, type(None))) else str(value)
