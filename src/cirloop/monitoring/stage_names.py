"""What the stages of a run are called where people read."""

from __future__ import annotations

import re

STAGES = {
    "evaluation": "evaluation",
    "checkpoint": "training",
    "judge": "judging",
    "hard_negatives": "mining",
    "augmented_samples": "captions",
    "ranked_negatives": "ranking",
    "accounting": "accounting",
}
"""Kinds of artifacts, and the stages that make them."""


def turn_and_kind(artifact: str) -> tuple[int, str]:
    """Return the iteration that a stage counts for, -1 for the base model, and its kind.

    Images mined by model t-1 serve iteration t.
    """
    kind = next((word for start, word in STAGES.items() if artifact.startswith(start)), artifact)
    number = re.search(r"_iter_(\d+)", artifact)
    return (-1 if number is None else int(number[1]) + (kind == "mining")), kind


def stage_words(artifact: str) -> str:
    """Return the name of the stage that makes an artifact, such as `iteration 2, mining`."""
    turn, kind = turn_and_kind(artifact)
    if kind == artifact:
        return artifact
    words = {-1: "base model", 0: "warm-up"}
    return f"{words.get(turn, f'iteration {turn}')}, {kind}"
