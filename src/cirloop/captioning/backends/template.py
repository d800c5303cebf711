"""No model: texts from a rule, for dry runs of everything around captioning.

The rule sees the human text and no picture, so it cannot know what is true of the mined image. A
result of texts like these means nothing; every text carries the name `template (no model)` into the
artifact, and a warning is logged.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from random import Random
from typing import Any

from cirloop.artifacts.store import fingerprint
from cirloop.captioning.base import Answer, Ask, Sees
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
"""Stands for the weights."""


class TemplateCaptioner:
    """Greedy is the first rule; a temperature, whichever, draws one by the seed and the
    question."""

    name = "template (no model)"
    sees: Sees = "nothing"

    def __init__(self) -> None:
        self.fingerprint = fingerprint(VERSION)
        logger.warning(
            "foundation.type template: texts are made by a rule that sees no picture. This is for"
            " dry runs; results of this run mean nothing"
        )

    def write(
        self,
        prompt: Prompt,
        asks: Sequence[Ask],
        vision: Sequence[Any],
        max_new_tokens: int,
        temperatures: Sequence[float],
        seed: int,
    ) -> list[list[Answer]]:
        """The human text in a rule's frame; JSON where the prompt asks for it. One of more than
        `max_new_tokens` words is cut there, and has not ended."""
        out = []
        for ask in asks:
            texts = []
            for turn, temperature in enumerate(temperatures):
                draw = Random(fingerprint([seed + turn, ask.first, ask.second, ask.text]))
                rule = draw.choice(RULES) if temperature else RULES[0]
                words = rule.replace("{text}", ask.text).split()
                text = " ".join(words[:max_new_tokens])
                said = json.dumps({KEY: text}) if prompt.answer == "json" else text
                texts.append(Answer(said, len(words) <= max_new_tokens))
            out.append(texts)
        return out

    def yes(self, prompt: Prompt, asks: Sequence[Ask], vision: Sequence[Any]) -> list[float]:
        """Raises UserError: a rule that sees no picture has no opinion, and a made-up one would
        pass for a check."""
        raise UserError(
            "foundation.type template looks at no picture and cannot judge. Set"
            " captioning.min_verify_probability to 0 and leave the verify filter out, or use"
            " another --foundation_model_backbone."
        )
