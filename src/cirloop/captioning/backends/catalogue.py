"""Texts from a catalogue, which knows what the images show: every text is true, and every verdict
right."""

from __future__ import annotations

import json
from collections.abc import Sequence

from cirloop.captioning.base import Answer, CaptionRequest, InputKind
from cirloop.captioning.parsing import KEY
from cirloop.captioning.prompts import Prompt
from cirloop.types import Catalogue

DECLINED = "none"
"""The answer by which prompts allow to decline."""


class CatalogueCaptioner:
    """A captioner that reads the catalogue, not the images."""

    name = "catalogue"
    input_kind: InputKind = "none"

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self.fingerprint = catalogue.fingerprint

    def generate(
        self,
        prompt: Prompt,
        requests: Sequence[CaptionRequest],
        vision: Sequence[object],
        max_new_tokens: int,
        temperatures: Sequence[float],
        seed: int,
    ) -> list[list[Answer]]:
        """Write a true text per temperature, the t-th by `seed` + t; "none" where the catalogue has
        none."""
        answers = []
        for request in requests:
            texts = [
                self._catalogue.write(request.reference, request.image, seed + t) or DECLINED
                for t in range(len(temperatures))
            ]
            if prompt.answer == "json":
                texts = [json.dumps({KEY: text}) for text in texts]
            answers.append([Answer(text, ended=True) for text in texts])
        return answers

    def yes_probability(
        self, prompt: Prompt, requests: Sequence[CaptionRequest], vision: Sequence[object]
    ) -> list[float]:
        """Return 1 where the text leads from the reference to the image, otherwise 0."""
        return [
            float(self._catalogue.is_true(request.reference, request.text, request.image))
            for request in requests
        ]
