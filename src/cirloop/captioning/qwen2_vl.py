"""Qwen2-VL as the foundation model that writes and judges modification texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from cirloop.artifacts import fingerprint
from cirloop.backbones.base import VisionInput
from cirloop.backbones.qwen2_vl import VisionMixin, load_vlm, place_vision
from cirloop.captioning.prompts import Prompt
from cirloop.types import ImageId

if TYPE_CHECKING:
    from cirloop.captioning.config import Qwen2VLFoundation


@dataclass(frozen=True, slots=True)
class Ask:
    """A question about two pictures."""

    first: ImageId
    second: ImageId
    text: str


class Qwen2VLCaptioner(VisionMixin):
    """Batched generation with left padding; the vision tokens come from the same cache as the embedder's."""

    def __init__(self, settings: Qwen2VLFoundation) -> None:
        self.settings = settings
        self.min_pixels, self.max_pixels = settings.min_pixels, settings.max_pixels
        self.vlm, self.processor, self.base_digest = load_vlm(settings.path, settings.dtype, settings.attention)
        self.name = settings.path

    @property
    def fingerprint(self) -> str:
        return fingerprint([self.base_digest, self.settings.model_dump(mode="json", exclude={"path"})])

    def _inputs(self, prompt: Prompt, asks: Sequence[Ask], vision: Sequence[VisionInput]) -> dict[str, torch.Tensor]:
        texts = self.processor.apply_chat_template(
            [prompt.messages(ask.text) for ask in asks], add_generation_prompt=True, tokenize=False
        )
        return self.tensors(texts, vision, side="left")

    @torch.inference_mode()
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
        embeds, _ = place_vision(self.vlm, inputs)
        torch.manual_seed(seed)
        sampling = (
            {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
            if temperature
            else {"do_sample": False}
        )
        model: Any = self.vlm  # transformers' own typing refuses the call
        out = model.generate(
            input_ids=inputs["input_ids"],
            inputs_embeds=embeds,
            attention_mask=inputs["attention_mask"],
            image_grid_thw=inputs["image_grid_thw"],
            mm_token_type_ids=(inputs["input_ids"] == self.vlm.config.image_token_id).int(),
            max_new_tokens=max_new_tokens,
            **sampling,
        )
        length = inputs["input_ids"].shape[1]
        assert torch.equal(out[:, :length], inputs["input_ids"]), "generate() did not return the prompt first"
        texts: list[str] = self.processor.tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)
        return [text.strip() for text in texts]

    @torch.inference_mode()
    def yes(self, prompt: Prompt, asks: Sequence[Ask], vision: Sequence[VisionInput]) -> list[float]:
        """Probability of "yes" against "no" as the first word of the answer, either case."""
        inputs = self._inputs(prompt, asks, vision)
        embeds, positions = place_vision(self.vlm, inputs)
        hidden = self.vlm.model.language_model(
            inputs_embeds=embeds,
            attention_mask=inputs["attention_mask"],
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state[:, -1]
        logits = self.vlm.lm_head(hidden).float()
        yes, no = (self._first_tokens(words) for words in (("yes", "Yes"), ("no", "No")))
        both = torch.stack([logits[:, yes].logsumexp(1), logits[:, no].logsumexp(1)], dim=1)
        return [round(p, 6) for p in both.softmax(1)[:, 0].tolist()]

    def _first_tokens(self, words: Sequence[str]) -> list[int]:
        return sorted({self.processor.tokenizer.encode(word)[0] for word in words})
