"""A Qwen-VL as the foundation model that writes and judges modification texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from cirloop.artifacts import fingerprint
from cirloop.backbones import qwen2_5_vl, qwen2_vl, qwen3_vl
from cirloop.backbones.base import VisionInput
from cirloop.backbones.vision import Inputs, load_vlm
from cirloop.captioning.base import Ask, Sees, chat_text, first_tokens, probability, sampling, signs
from cirloop.captioning.lending import base_of, lends
from cirloop.captioning.prompts import Prompt

if TYPE_CHECKING:
    from PIL import Image

    from cirloop.captioning.config import QwenFoundation


class QwenVLCaptioner(qwen2_vl.VisionMixin):
    """Batched generation with left padding; the vision tokens come from the same cache as the embedder's.

    On the weights of the embedder `shared` where that lends them, with its adapter off in every call.
    """

    sees: Sees = "tokens"

    def __init__(self, settings: QwenFoundation, shared: Any | None = None) -> None:
        self.settings = settings
        self.min_pixels, self.max_pixels = settings.min_pixels, settings.max_pixels
        self.lender = shared if shared is not None and lends(shared, settings) else None
        if self.lender is not None:
            self.vlm, self.processor = self.lender.vlm, self.lender.processor
            self.base_digest = self.lender.base_digest
        else:
            self.vlm, self.processor, self.base_digest = load_vlm(
                settings.path, settings.dtype, settings.attention, (settings.type,)
            )
        self.name, self.signs = settings.path, signs(self.processor)

    @property
    def fingerprint(self) -> str:
        return fingerprint([self.base_digest, self.settings.model_dump(mode="json", exclude={"path"})])

    def encode_images(self, images: Sequence[Image.Image]) -> list[VisionInput]:
        with base_of(self.lender):
            return super().encode_images(images)

    def turn(self, prompt: Prompt, text: str) -> str:
        """The conversation as the model reads it, each image as one sign."""
        return chat_text(self.processor, self.signs, prompt, text)

    def _inputs(self, prompt: Prompt, asks: Sequence[Ask], vision: Sequence[VisionInput]) -> Inputs:
        return self.tensors([self.turn(prompt, ask.text) for ask in asks], vision, side="left")

    def write(
        self,
        prompt: Prompt,
        asks: Sequence[Ask],
        vision: Sequence[VisionInput],
        max_new_tokens: int,
        temperature: float,
        seed: int,
    ) -> list[str]:
        """One answer per question; `temperature` 0 is greedy. `vision` holds two images per question, in order."""
        inputs = self._inputs(prompt, asks, vision)
        torch.manual_seed(seed)
        with base_of(self.lender):
            out = self.generate(inputs, max_new_tokens=max_new_tokens, **sampling(temperature))
        length = inputs["input_ids"].shape[1]
        assert torch.equal(out[:, :length], inputs["input_ids"]), "generate() did not return the prompt first"
        texts: list[str] = self.processor.tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def yes(self, prompt: Prompt, asks: Sequence[Ask], vision: Sequence[VisionInput]) -> list[float]:
        """Probability of "yes" against "no" as the first word of the answer, either case."""
        inputs = self._inputs(prompt, asks, vision)
        with base_of(self.lender):
            placed = self.place(self.vlm, inputs)
            hidden = self.vlm.model.language_model(**placed, use_cache=False).last_hidden_state[:, -1]
            logits = self.vlm.lm_head(hidden)
        yes, no = (first_tokens(self.processor.tokenizer, words) for words in (("yes", "Yes"), ("no", "No")))
        return probability(logits, yes, no)


class Qwen25VLCaptioner(qwen2_5_vl.VisionMixin, QwenVLCaptioner):
    """Qwen2.5-VL's."""


class Qwen3VLCaptioner(qwen3_vl.VisionMixin, QwenVLCaptioner):
    """Qwen3-VL's."""


CAPTIONERS: dict[str, type[QwenVLCaptioner]] = {
    "qwen2_vl": QwenVLCaptioner,
    "qwen2_5_vl": Qwen25VLCaptioner,
    "qwen3_vl": Qwen3VLCaptioner,
}
