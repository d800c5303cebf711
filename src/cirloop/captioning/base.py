"""What every captioner is to the rest of the program, and what captioners share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from cirloop.captioning.prompts import Prompt
from cirloop.types import ImageId, UserError

Sees = Literal["tokens", "pictures", "nothing"]


@dataclass(frozen=True, slots=True)
class Ask:
    """A question about two pictures."""

    first: ImageId
    second: ImageId
    text: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What a foundation model wrote. `ended`: it came to its own end, an end sign of the model's
    within `max_new_tokens`; otherwise the text stops wherever that limit fell."""

    text: str
    ended: bool


class Captioner(Protocol):
    """A foundation model that writes and judges texts about two pictures. A text is words, also
    where it looks like a sign of the chat's (`as_words`)."""

    name: str
    """What the artifacts call it."""
    sees: Sees
    """What `vision` holds, two per question in order: `VisionInput`s (`encode_images` and
    `vision_key` make and keep them), pictures as they are, or no more than an empty list."""

    @property
    def fingerprint(self) -> str: ...

    def write(
        self,
        prompt: Prompt,
        asks: Sequence[Ask],
        vision: Sequence[Any],
        max_new_tokens: int,
        temperatures: Sequence[float],
        seed: int,
    ) -> list[list[Answer]]:
        """Per question an answer for each of `temperatures`, the t-th drawn with `seed` + t; 0 is
        greedy, and then no answer depends on the others asked. `sampling` says what holds of the
        model's generation_config.json."""
        ...

    def yes(self, prompt: Prompt, asks: Sequence[Ask], vision: Sequence[Any]) -> list[float]:
        """Probability of "yes" against "no" as the first word of the answer."""
        ...


WHOLE = {
    "top_k": 0,
    "top_p": 1.0,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
"""Arguments of `generate` that leave nothing of a distribution out."""


def sampling(temperature: float) -> dict[str, Any]:
    """Arguments of `generate`: greedy, or from the whole distribution.

    Of a model's generation_config.json, what ends an answer and what changes scores
    (`repetition_penalty`, as Qwen2.5-VL publishes it) holds for greedy and sampled answers alike;
    what narrows a distribution (its temperature, `top_k`, `top_p` and their like) and searches by
    beams hold for neither.
    """
    if not temperature:
        return {"do_sample": False, "num_beams": 1}
    return {"do_sample": True, "num_beams": 1, "temperature": temperature, **WHOLE}


def without_padding(ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """`ids_BT` with each row's own last token in the place of its padding, for `generate`.

    No model looks at padding, but the repetition penalty looks at all tokens of a row: padding,
    which is an end sign in Qwen-VLs, would be made less likely in padded rows only, and answers
    would depend on their batch. Rows end in a token of their own.
    """
    return torch.where(mask_BT.bool(), ids_BT, ids_BT[:, -1:])


def end_signs(vlm: Any, name: str) -> list[int]:
    """Tokens that end an answer, from the model's generation_config.json. Raises UserError where it
    names none."""
    ends = vlm.generation_config.eos_token_id
    if ends is None:
        raise UserError(
            f"foundation.path {name!r} names no sign that ends an answer (eos_token_id), so every"
            " text would be cut off. Put the id of its end-of-turn token into its"
            " generation_config.json as eos_token_id."
        )
    return [ends] if isinstance(ends, int) else [*ends]


def signs(processor: Any) -> list[str]:
    """The strings that a processor takes for something else than words: turns, places of images,
    ends. Longest first, so that none is looked for inside another."""
    tokenizer = processor.tokenizer
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    places = {
        getattr(processor, f"{kind}_token", None) or "" for kind in ("image", "video", "audio")
    }
    return sorted(
        {*special, *tokenizer.all_special_tokens, *places} - {""}, key=lambda s: (-len(s), s)
    )


def as_words(text: str, signs: Iterable[str]) -> str:
    """`text` with every sign broken by a space behind its first character, so that it is read as
    words. A text without signs stays as it is."""
    found = True
    while found:
        found = False
        for sign in signs:
            if len(sign) > 1 and sign in text:
                text, found = text.replace(sign, f"{sign[0]} {sign[1:]}"), True
    return text


def first_tokens(tokenizer: Any, words: Sequence[str]) -> list[int]:
    """The tokens that answers starting with one of `words` start with."""
    return sorted({tokenizer.encode(word, add_special_tokens=False)[0] for word in words})


def yes_and_no(tokenizer: Any) -> tuple[list[int], list[int]]:
    """First tokens of either answer, in either case, with and without a space before it; none
    stands for both."""
    yes, no = (
        set(first_tokens(tokenizer, words))
        for words in (("yes", "Yes", " yes", " Yes"), ("no", "No", " no", " No"))
    )
    if yes <= no or no <= yes:
        raise UserError(
            "The foundation model's tokenizer cannot tell yes from no. Set"
            " captioning.min_verify_probability to 0."
        )
    return sorted(yes - no), sorted(no - yes)


def probability(logits_BV: torch.Tensor, yes: list[int], no: list[int]) -> list[float]:
    """Of the tokens `yes` against `no`, from the logits (B, vocabulary) of the first word of the
    answer."""
    logits_BV = logits_BV.float()
    both_B2 = torch.stack([logits_BV[:, yes].logsumexp(1), logits_BV[:, no].logsumexp(1)], dim=1)
    return [round(p, 6) for p in both_B2.softmax(1)[:, 0].tolist()]


def chat_text(processor: Any, signs: Iterable[str], prompt: Prompt, text: str) -> str:
    """The conversation as the model reads it, each image as one sign. A start sign that the
    tokenizer puts too is left to the tokenizer."""
    tokenizer = processor.tokenizer
    made: str = processor.apply_chat_template(
        prompt.messages(as_words(text, signs)), add_generation_prompt=True, tokenize=False
    )
    bos = tokenizer.bos_token
    return (
        made.removeprefix(bos)
        if bos and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
        else made
    )
