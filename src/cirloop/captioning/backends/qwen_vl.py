"""A Qwen-VL as the foundation model that writes and judges modification texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from cirloop.artifacts.store import fingerprint
from cirloop.backbones import qwen2_5_vl, qwen2_vl, qwen3_vl
from cirloop.backbones.base import VisionInput
from cirloop.backbones.vision import load_vlm
from cirloop.captioning.base import (
    Answer,
    Ask,
    Sees,
    chat_text,
    end_signs,
    first_tokens,
    probability,
    sampling,
    signs,
)
from cirloop.captioning.decoding import decode
from cirloop.captioning.prefix_cache import Reading, read
from cirloop.captioning.prompts import Prompt
from cirloop.captioning.weight_sharing import base_of, lends
from cirloop.monitoring import profiling

if TYPE_CHECKING:
    from PIL import Image

    from cirloop.captioning.config import QwenFoundation


class QwenVLCaptioner(qwen2_vl.VisionMixin):
    """Batched generation; vision tokens from the same cache as the embedder's, what questions share
    is read once.

    On the weights of the embedder `shared` where that lends them, with its adapter off in every
    call.
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
        self._ends = end_signs(self.vlm, self.name)
        kinds = getattr(self.vlm.config.text_config, "layer_types", None) or []
        self.shares = not any(
            "sliding" in kind for kind in kinds
        )  # a window counts padding inside a row too

    @property
    def fingerprint(self) -> str:
        return fingerprint(
            [self.base_digest, self.settings.model_dump(mode="json", exclude={"path"})]
        )

    def encode_images(
        self, images: Sequence[Image.Image], prepared: Any = None
    ) -> list[VisionInput]:
        with base_of(self.lender):
            return super().encode_images(images, prepared)

    def turn(self, prompt: Prompt, text: str) -> str:
        """The conversation as the model reads it, each image as one sign."""
        return chat_text(self.processor, self.signs, prompt, text)

    def read(self, prompt: Prompt, asks: Sequence[Ask], vision: Sequence[VisionInput]) -> Reading:
        """The questions in the language model, whose adapter must be off."""
        inputs = self.tensors([self.turn(prompt, ask.text) for ask in asks], vision, side="left")
        rows = [
            ids[mask.bool()]
            for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        ]
        return read(self, rows, asks, vision, self.shares)

    def write(
        self,
        prompt: Prompt,
        asks: Sequence[Ask],
        vision: Sequence[VisionInput],
        max_new_tokens: int,
        temperatures: Sequence[float],
        seed: int,
    ) -> list[list[Answer]]:
        """An answer per temperature and question, read once. `vision` holds two images per
        question, in order."""
        with base_of(self.lender):
            reading = self.read(prompt, asks, vision)
            turns, pad = [], self.processor.tokenizer.pad_token_id
            for turn, temperature in enumerate(temperatures):
                torch.manual_seed(seed + turn)
                made = decode(self.vlm, reading, max_new_tokens, **sampling(temperature))
                profiling.add(tokens_written=sum(int(row.ne(pad).sum()) for row in made))
                turns.append([self._answer(row) for row in made])
        return [list(answers) for answers in zip(*turns, strict=True)]

    def _answer(self, tokens: torch.Tensor) -> Answer:
        text: str = self.processor.tokenizer.decode(tokens, skip_special_tokens=True)
        ended = torch.isin(tokens, torch.tensor(self._ends, device=tokens.device)).any()
        return Answer(text.strip(), bool(ended))

    def yes(
        self, prompt: Prompt, asks: Sequence[Ask], vision: Sequence[VisionInput]
    ) -> list[float]:
        """Probability of "yes" against "no" as the first word of the answer, either case."""
        with base_of(self.lender):
            logits = self.vlm.lm_head(self.read(prompt, asks, vision).last_BD)
        yes, no = (
            first_tokens(self.processor.tokenizer, words)
            for words in (("yes", "Yes"), ("no", "No"))
        )
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
