"""Mined images that are right for the human text itself become further positives of it.

A benchmark names one target per query, so the images that a model ranks high hold right answers
that nobody annotated (QuRe, ICML 2025, arXiv 2507.12416, leaves their use open). The foundation
model judges each mined image by the human text. How far it can be trusted is measured first, on
pairs whose truth is known: human triplets, and as wrong ones their targets with other queries'
texts. A few of those are right by chance, so the precision is a lower bound.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import TypedDict

from cirloop.captioning.base import CaptionRequest
from cirloop.captioning.config import RelabelSettings
from cirloop.types import Triplet

HUMAN_TEXT = "human text"
"""The prompt's name in a relabelled triplet: nothing was written."""
WRONG_PER_RIGHT = 9
"""Planted wrong pairs for each right one: of mined images, about one in ten is right on the drawn
data, where that is known."""


class Judgement(TypedDict):
    """How the foundation model judged planted pairs and mined images, in the artifact's summary.

    `precision` is None where it called no planted pair right.
    """

    precision: float | None
    recall: float
    judged: int
    right: int
    kept: int


def planted_pairs(
    triplets: Sequence[Triplet], num: int, seed: int
) -> tuple[list[CaptionRequest], list[bool]]:
    """Draw pairs of a query and an image, and whether the image is right: `num` human triplets
    (all, where there are fewer), and nine times as many targets with another query's text."""
    random = Random(f"{seed}/planted")
    right = random.sample(list(triplets), min(num, len(triplets)))
    requests = [CaptionRequest(t.query.reference, t.target, t.query.text) for t in right]
    for triplet in right:
        texts = [t.query.text for t in triplets if t.query.text != triplet.query.text]
        for text in random.sample(texts, min(WRONG_PER_RIGHT, len(texts))):
            requests.append(CaptionRequest(triplet.query.reference, triplet.target, text))
    return requests, [i < len(right) for i in range(len(requests))]


def judge_mined(
    mined: Sequence[CaptionRequest],
    triplets: Sequence[Triplet],
    settings: RelabelSettings,
    yes_probability: Callable[[Sequence[CaptionRequest]], Sequence[float]],
    seed: int,
) -> tuple[dict[int, float], Judgement]:
    """Return the probability of each pair in `mined` that the foundation model calls right, by its
    position, and how well it judged; no pair where it is not precise enough."""
    planted, is_right = planted_pairs(triplets, settings.num_planted, seed)
    probabilities = yes_probability([*planted, *mined])
    of_planted = probabilities[: len(planted)]
    said_right = [
        right
        for right, probability in zip(is_right, of_planted, strict=True)
        if probability >= settings.min_probability
    ]
    precision = sum(said_right) / len(said_right) if said_right else None
    positives = {
        i: probability
        for i, probability in enumerate(probabilities[len(planted) :])
        if probability >= settings.min_probability
    }
    is_precise = precision is not None and precision >= settings.min_precision
    judgement: Judgement = {
        "precision": None if precision is None else round(precision, 4),
        "recall": round(sum(said_right) / sum(is_right), 4),
        "judged": len(mined),
        "right": len(positives),
        "kept": len(positives) if is_precise else 0,
    }
    return positives if is_precise else {}, judgement
