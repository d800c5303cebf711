"""A Qwen-VL as the foundation model that writes and verifies modification texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from cirloop.artifacts.store import fingerprint
from cirloop.backbones import qwen2_5_vl, qwen2_vl, qwen3_vl
from cirloop.backbones.base import ImageFeatures, PreparedImages
from cirloop.backbones.vision import load_vlm
from cirloop.captioning.base import (
    Answer,
    CaptionRequest,
    InputKind,
    end_token_ids,
    first_token_ids,
    render_chat,
    sampling_kwargs,
    yes_probability,
)
from cirloop.captioning.decoding import decode
from cirloop.captioning.prefix_cache import PrefillState, prefill
from cirloop.captioning.prompts import Prompt
from cirloop.captioning.weight_sharing import adapter_disabled, can_share_weights
from cirloop.monitoring import profiling

if TYPE_CHECKING:
    from PIL import Image

    from cirloop.backbones.vlm import VlmEmbedder
    from cirloop.captioning.foundation import QwenFoundation


class QwenVLCaptioner(qwen2_vl.VisionMixin):
    """A captioner with batched generation, cached vision tokens and shared prefixes.

    It runs on the weights of `embedder` where those can be shared, with the adapter off in every
    call.
    """

    input_kind: InputKind = "vision_tokens"

    def __init__(self, settings: QwenFoundation, embedder: VlmEmbedder | None = None) -> None:
        self.settings = settings
        self.name = settings.path
        self.min_pixels = settings.min_pixels
        self.max_pixels = settings.max_pixels
        shares = embedder is not None and can_share_weights(embedder, settings)
        self.shared_embedder = embedder if shares else None
        if self.shared_embedder is not None:
            self.vlm = self.shared_embedder.vlm
            self.processor = self.shared_embedder.processor
            self.base_digest = self.shared_embedder.base_digest
        else:
            self.vlm, self.processor, self.base_digest = load_vlm(
                settings.path, settings.resolve_dir(), settings.dtype, settings.attention
            )
        self.end_ids = end_token_ids(self.vlm, self.name)
        layer_types = getattr(self.vlm.config.text_config, "layer_types", None) or []
        # A sliding window counts padding inside a row too.
        self.shares_prefixes = not any("sliding" in layer_type for layer_type in layer_types)

    @property
    def fingerprint(self) -> str:
        settings = self.settings.model_dump(mode="json", exclude={"path"})
        return fingerprint([self.base_digest, settings])

    def encode_images(
        self, images: Sequence[Image.Image], prepared: PreparedImages | None = None
    ) -> list[ImageFeatures]:
        """Encode images as the base does."""
        with adapter_disabled(self.shared_embedder):
            return super().encode_images(images, prepared)

    def render_chat(self, prompt: Prompt, text: str) -> str:
        """Render the conversation as the model reads it, with one placeholder per image."""
        return render_chat(self.processor, self.special_tokens, prompt, text)

    def prefill(
        self, prompt: Prompt, requests: Sequence[CaptionRequest], vision: Sequence[ImageFeatures]
    ) -> PrefillState:
        """Read the requests by the language model, whose adapter must be off."""
        texts = [self.render_chat(prompt, request.text) for request in requests]
        batch = self.tokenize_with_images(texts, vision, side="left")
        rows = [
            ids[mask.bool()]
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        return prefill(self, rows, requests, vision, self.shares_prefixes)

    def generate(
        self,
        prompt: Prompt,
        requests: Sequence[CaptionRequest],
        vision: Sequence[ImageFeatures],
        max_new_tokens: int,
        temperatures: Sequence[float],
        seed: int,
    ) -> list[list[Answer]]:
        """Generate an answer per request and temperature, reading each request once.

        `vision` holds two images per request, in order.
        """
        answers_by_temperature = []
        pad = self.processor.tokenizer.pad_token_id
        with adapter_disabled(self.shared_embedder):
            prefilled = self.prefill(prompt, requests, vision)
            for number, temperature in enumerate(temperatures):
                torch.manual_seed(seed + number)
                ids = decode(self.vlm, prefilled, max_new_tokens, **sampling_kwargs(temperature))
                profiling.add(tokens_written=sum(int(row.ne(pad).sum()) for row in ids))
                answers_by_temperature.append([self._answer(row) for row in ids])
        return [list(answers) for answers in zip(*answers_by_temperature, strict=True)]

    def _answer(self, ids: torch.Tensor) -> Answer:
        text: str = self.processor.tokenizer.decode(ids, skip_special_tokens=True)
        ended = torch.isin(ids, torch.tensor(self.end_ids, device=ids.device)).any()
        return Answer(text.strip(), bool(ended))

    def yes_probability(
        self, prompt: Prompt, requests: Sequence[CaptionRequest], vision: Sequence[ImageFeatures]
    ) -> list[float]:
        """Return the probability of "yes" against "no" as the first word, in either case."""
        with adapter_disabled(self.shared_embedder):
            logits_BV = self.vlm.lm_head(self.prefill(prompt, requests, vision).last_BD)
        yes_ids = first_token_ids(self.processor, ("yes", "Yes"))
        no_ids = first_token_ids(self.processor, ("no", "No"))
        return yes_probability(logits_BV, yes_ids, no_ids)


class Qwen25VLCaptioner(qwen2_5_vl.VisionMixin, QwenVLCaptioner):
    """The captioner of Qwen2.5-VL."""


class Qwen3VLCaptioner(qwen3_vl.VisionMixin, QwenVLCaptioner):
    """The captioner of Qwen3-VL."""
