"""Mined images that are right for the human text itself become further positives of it.

A benchmark names one target per query, so the images that a model ranks high hold right answers
that nobody annotated (QuRe, ICML 2025, arXiv 2507.12416, leaves their use open). The foundation
model judges each mined image by the human text. How far it can be trusted is measured first, on
pairs whose truth is known: human triplets, and as wrong ones their targets with other queries'
texts. A few of those are right by chance, so the precision is a lower bound.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypedDict

from cirloop.captioning.base import CaptionRequest
from cirloop.captioning.config import RelabelSettings
from cirloop.captioning.planted import PlantedPairs

HUMAN_TEXT = "human text"
"""The prompt's name in a relabelled triplet: nothing was written."""


class Judgement(TypedDict):
    """How the foundation model judged planted pairs and mined images, in the artifact's summary.

    `precision` is None where it called no planted pair right.
    """

    precision: float | None
    recall: float
    judged: int
    right: int
    kept: int


def judge_mined(
    mined: Sequence[CaptionRequest],
    planted: PlantedPairs,
    settings: RelabelSettings,
    yes_probability: Callable[[Sequence[CaptionRequest]], Sequence[float]],
) -> tuple[dict[int, float], Judgement]:
    """Return the probability of each pair in `mined` that the foundation model calls right, by its
    position, and how well it judged; no pair where it is not precise enough."""
    # Asked apart from the mined ones, so that the answers are those of the judge's measurement.
    said_right = [
        right
        for right, probability in zip(
            planted.is_right, yes_probability(planted.requests), strict=True
        )
        if probability >= settings.min_probability
    ]
    precision = sum(said_right) / len(said_right) if said_right else None
    positives = {
        i: probability
        for i, probability in enumerate(yes_probability(mined))
        if probability >= settings.min_probability
    }
    is_precise = precision is not None and precision >= settings.min_precision
    judgement: Judgement = {
        "precision": None if precision is None else round(precision, 4),
        "recall": round(sum(said_right) / sum(planted.is_right), 4),
        "judged": len(mined),
        "right": len(positives),
        "kept": len(positives) if is_precise else 0,
    }
    return positives if is_precise else {}, judgement
