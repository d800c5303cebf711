"""Texts from the drawn scenes themselves: what the best possible foundation model would give.

For `shapes` only, as the upper bound of a study: every text is true, and every verdict right. A
text is said as the human texts are, with names and looseness drawn by the seed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from cirloop.artifacts.store import fingerprint
from cirloop.captioning.base import Answer, CaptionRequest, InputKind
from cirloop.captioning.parsing import KEY
from cirloop.captioning.prompts import Prompt
from cirloop.data.shapes.language import phrase_changes, read, write
from cirloop.data.shapes.load import row_of, split_of
from cirloop.data.shapes.scene import Scene, SeededRandom, differences, results
from cirloop.data.shapes.splits import LOOSE_PERCENT, scenes_of
from cirloop.types import ImageId

MAX_CHANGES = 3
"""Images that differ in more are declined, as the prompt allows."""
VERSION = "scenes-1"
"""What the fingerprint covers in place of weights."""


class SceneCaptioner:
    """A captioner that reads the scenes, not the images."""

    name = "scenes (the truth)"
    input_kind: InputKind = "none"

    def __init__(self) -> None:
        self.fingerprint = fingerprint(VERSION)

    def generate(
        self,
        prompt: Prompt,
        requests: Sequence[CaptionRequest],
        vision: Sequence[object],
        max_new_tokens: int,
        temperatures: Sequence[float],
        seed: int,
    ) -> list[list[Answer]]:
        """Write a true text per temperature; "none" where the scenes are equal or far apart."""
        answers = []
        for request in requests:
            texts = [_text(request, seed + t) for t in range(len(temperatures))]
            if prompt.answer == "json":
                texts = [json.dumps({KEY: text}) for text in texts]
            answers.append([Answer(text, ended=True) for text in texts])
        return answers

    def yes_probability(
        self, prompt: Prompt, requests: Sequence[CaptionRequest], vision: Sequence[object]
    ) -> list[float]:
        """Return 1 where the text turns the reference into the image, otherwise 0."""
        return [float(_is_true(request)) for request in requests]


def _scene(image: ImageId) -> Scene:
    return scenes_of(split_of(image)).scenes[row_of(image)]


def _text(request: CaptionRequest, seed: int) -> str:
    reference = _scene(request.reference)
    image = _scene(request.image)
    rng = SeededRandom("scenes", seed, request.reference, request.image)
    changes = tuple(rng.shuffled(differences(reference, image)))
    if not 1 <= len(changes) <= MAX_CHANGES:
        return "none"
    loose = phrase_changes(rng, reference, changes, LOOSE_PERCENT)
    is_exact = image in results(reference, loose)
    phrasing = scenes_of(split_of(request.reference)).variant.phrasing
    return write(rng, loose if is_exact else changes, phrasing)


def _is_true(request: CaptionRequest) -> bool:
    changes = read(request.text)
    if changes is None:
        return False
    return _scene(request.image) in results(_scene(request.reference), changes)
