"""Texts from a rule in place of a model, for dry runs of everything around captioning.

The rule sees the human text and no image, so it cannot know what is true of the mined image.
Results with such texts mean nothing: every text carries the name `template (no model)` into the
artifact, and a warning is logged.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from random import Random

from cirloop.artifacts.store import fingerprint
from cirloop.captioning.base import Answer, CaptionRequest, InputKind
from cirloop.captioning.parsing import KEY
from cirloop.captioning.prompts import Prompt
from cirloop.types import UserError

logger = logging.getLogger(__name__)
RULES = (
    "not quite this: {text}",
    "something else than this: {text}",
    "almost, but with a difference: {text}",
    "nearly as asked: {text}",
)
VERSION = ["template-1", *RULES]
"""What the fingerprint covers in place of weights."""


class TemplateCaptioner:
    """A captioner that puts the human text into a rule's frame.

    Greedy texts take the first rule; any temperature above 0 draws one by the seed and the request.
    """

    name = "template (no model)"
    input_kind: InputKind = "none"

    def __init__(self) -> None:
        self.fingerprint = fingerprint(VERSION)
        logger.warning(
            "foundation.type template: texts are made by a rule that sees no image. This is for"
            " dry runs; results of this run mean nothing"
        )

    def generate(
        self,
        prompt: Prompt,
        requests: Sequence[CaptionRequest],
        vision: Sequence[object],
        max_new_tokens: int,
        temperatures: Sequence[float],
        seed: int,
    ) -> list[list[Answer]]:
        """Put the human text into a rule's frame, as JSON where the prompt asks for it.

        A text of more than `max_new_tokens` words is cut there, and has not ended.
        """
        return [
            [
                _answer(prompt, request, max_new_tokens, temperature, seed + number)
                for number, temperature in enumerate(temperatures)
            ]
            for request in requests
        ]

    def yes_probability(
        self, prompt: Prompt, requests: Sequence[CaptionRequest], vision: Sequence[object]
    ) -> list[float]:
        """Raise UserError: an opinion of a rule that sees no image would pass for a check."""
        raise UserError(
            "foundation.type template looks at no image and cannot judge. Set"
            " captioning.min_verify_probability to 0 and leave the verify filter out, or use"
            " another --foundation_model_backbone."
        )


def _answer(
    prompt: Prompt, request: CaptionRequest, max_new_tokens: int, temperature: float, seed: int
) -> Answer:
    random = Random(fingerprint([seed, request.reference, request.image, request.text]))
    rule = random.choice(RULES) if temperature else RULES[0]
    words = rule.replace("{text}", request.text).split()
    text = " ".join(words[:max_new_tokens])
    if prompt.answer == "json":
        text = json.dumps({KEY: text})
    return Answer(text, len(words) <= max_new_tokens)
