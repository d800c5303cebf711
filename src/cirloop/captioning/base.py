"""The interface of captioners, and what their implementations share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from cirloop.backbones.base import VisionLanguageModel
from cirloop.backbones.special_tokens import Processor, escape_special_tokens
from cirloop.captioning.prompts import Prompt
from cirloop.types import ImageId, UserError

InputKind = Literal["vision_tokens", "images", "none"]


@dataclass(frozen=True, slots=True)
class CaptionRequest:
    """A question about a reference image and another image, with the text it is about."""

    reference: ImageId
    image: ImageId
    text: str


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer of a foundation model.

    `ended` is true where the model wrote an end token within `max_new_tokens`; otherwise the limit
    cut the text off.
    """

    text: str
    ended: bool


class Captioner(Protocol):
    """A foundation model that writes and verifies texts about two images.

    User text is never interpreted as chat markup: special tokens in it are escaped
    (`escape_special_tokens`).
    """

    name: str
    """The captioner's name in the artifacts."""
    input_kind: InputKind
    """Content of `vision`, two elements per request in order: `ImageFeatures`, which
    `encode_images` computes and `vision_key` identifies; images as they are; or nothing at all."""

    @property
    def fingerprint(self) -> str: ...

    def generate(
        self,
        prompt: Prompt,
        requests: Sequence[CaptionRequest],
        vision: Sequence[Any],
        max_new_tokens: int,
        temperatures: Sequence[float],
        seed: int,
    ) -> list[list[Answer]]:
        """Generate per request an answer for each of `temperatures`, the t-th with `seed` + t.

        Temperature 0 is greedy: that answer depends on no other request. `sampling_kwargs` says
        what holds of the model's generation_config.json.
        """
        ...

    def yes_probability(
        self, prompt: Prompt, requests: Sequence[CaptionRequest], vision: Sequence[Any]
    ) -> list[float]:
        """Return the probability of "yes" against "no" as the first word of each answer."""
        ...


UNRESTRICTED_SAMPLING: dict[str, float | None] = {
    "top_k": 0,
    "top_p": 1.0,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
"""Arguments of `generate` that keep the whole distribution."""


def sampling_kwargs(temperature: float) -> dict[str, float | None]:
    """Return arguments of `generate`: greedy, or sampling from the whole distribution.

    Of a model's generation_config.json, end tokens and `repetition_penalty` (Qwen2.5-VL publishes
    one) hold for greedy and sampled answers alike. Settings that narrow the distribution
    (temperature, `top_k`, `top_p` and their like) and beam search hold for neither.
    """
    if not temperature:
        return {"do_sample": False, "num_beams": 1}
    return {
        "do_sample": True,
        "num_beams": 1,
        "temperature": temperature,
        **UNRESTRICTED_SAMPLING,
    }


def without_padding(ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Replace the padding of each row by the row's own last token, for `generate`.

    No model attends to padding, but the repetition penalty counts all tokens of a row: padding,
    which is an end token in Qwen-VLs, would become less likely in padded rows only, and answers
    would depend on their batch. The last token of every row is its own.
    """
    return torch.where(mask_BT.bool(), ids_BT, ids_BT[:, -1:])


def end_token_ids(vlm: VisionLanguageModel, name: str) -> list[int]:
    """Return the ids of tokens that end an answer, from the model's generation_config.json.

    Raises UserError where the file names none.
    """
    ends = vlm.generation_config.eos_token_id
    if ends is None:
        raise UserError(
            f"foundation.path {name!r} names no sign that ends an answer (eos_token_id), so every"
            " text would be cut off. Put the id of its end-of-turn token into its"
            " generation_config.json as eos_token_id."
        )
    return [ends] if isinstance(ends, int) else [*ends]


def first_token_ids(processor: Processor, words: Sequence[str]) -> list[int]:
    """Return the ids of the first tokens of answers that start with one of `words`."""
    tokenizer = processor.tokenizer
    return sorted({tokenizer.encode(word, add_special_tokens=False)[0] for word in words})


def yes_no_token_ids(processor: Processor) -> tuple[list[int], list[int]]:
    """Return the first tokens of "yes" and of "no", in either case, with and without a space.

    No id is in both lists. Raises UserError where the tokenizer does not tell the two apart.
    """
    yes = {*first_token_ids(processor, ("yes", "Yes", " yes", " Yes"))}
    no = {*first_token_ids(processor, ("no", "No", " no", " No"))}
    if yes <= no or no <= yes:
        raise UserError(
            "The foundation model's tokenizer cannot tell yes from no. Set"
            " captioning.min_verify_probability to 0."
        )
    return sorted(yes - no), sorted(no - yes)


def yes_probability(
    logits_BV: torch.Tensor, yes_ids: Sequence[int], no_ids: Sequence[int]
) -> list[float]:
    """Return the probability of `yes_ids` against `no_ids`.

    `logits_BV` (B, vocabulary) are those of the first word of the answer.
    """
    logits_BV = logits_BV.float()
    yes_B = logits_BV[:, yes_ids].logsumexp(1)
    no_B = logits_BV[:, no_ids].logsumexp(1)
    probability_B2 = torch.stack([yes_B, no_B], dim=1).softmax(1)
    return [round(p, 6) for p in probability_B2[:, 0].tolist()]


def render_chat(processor: Processor, special: Iterable[str], prompt: Prompt, text: str) -> str:
    """Render the conversation as the model reads it, with one placeholder per image.

    A start token that the tokenizer adds by itself is left to the tokenizer.
    """
    tokenizer = processor.tokenizer
    conversation: str = processor.apply_chat_template(
        prompt.messages(escape_special_tokens(text, special)),
        add_generation_prompt=True,
        tokenize=False,
    )
    bos = tokenizer.bos_token
    if bos and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]:
        return conversation.removeprefix(bos)
    return conversation
