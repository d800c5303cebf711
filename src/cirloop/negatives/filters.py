"""False-negative filters: named steps after any strategy, each with a count of what it dropped.

An image that is right but not annotated spoils what is learnt from it. A filter sees pairs of a
query and a mined image and says which to keep; it never sees what is right. N pairs.

- `score_margin`: keeps what scores at most the target's score less `margin` (NV-Retriever, arXiv
  2407.15831).
- `near_duplicate`: drops images whose vector has a cosine above `threshold` with the target's:
  another image of it.
- `verify`: asks the foundation model whether the image is what reference and text ask for; drops it
  where its probability of yes is above `threshold` (ReCALL's verification, turned round: arXiv
  2602.01639).
- `agreement`: drops images that a second embedder also scores above the target: two models that
  agree are more often right than the annotation is complete.

Degenerate cases: a filter may drop all images of a query; nothing is put in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, TypedDict

import numpy as np
from pydantic import Field

from cirloop.config.base import Settings
from cirloop.retrieval.arrays import Floats, Mask, Rows


@dataclass(frozen=True, slots=True)
class MinedPairs:
    """Pairs of a query and a mined image: query and gallery indices (N,), scores, and the targets'
    gallery rows and scores."""

    query_index_N: Rows
    gallery_index_N: Rows
    scores_N: Floats
    targets_N: Rows
    target_scores_N: Floats

    def select(self, keep_N: Mask) -> MinedPairs:
        """Return the pairs that `keep_N` marks."""
        return MinedPairs(*(getattr(self, name)[keep_N] for name in self.__dataclass_fields__))


@dataclass(frozen=True, slots=True)
class FilterContext:
    """Knowledge of filters: the gallery's vectors, P(yes) of pairs, and a second model's scores of
    images and targets."""

    vectors_GD: Floats
    yes_probability: Callable[[MinedPairs], Sequence[float]]
    second_model_scores: Callable[[str, MinedPairs], tuple[Floats, Floats]]


class ScoreMargin(Settings):
    """Filter that keeps images that score at most the target's score less `margin`."""

    type: Literal["score_margin"] = "score_margin"
    margin: float = 0.0

    def keep(self, pairs: MinedPairs, context: FilterContext) -> Mask:
        return np.asarray(pairs.scores_N <= pairs.target_scores_N - np.float32(self.margin))


class NearDuplicate(Settings):
    """Filter that drops images with a cosine to the target above `threshold`."""

    type: Literal["near_duplicate"] = "near_duplicate"
    threshold: float = Field(0.95, gt=-1, le=1)

    def keep(self, pairs: MinedPairs, context: FilterContext) -> Mask:
        images = context.vectors_GD[pairs.gallery_index_N]
        targets = context.vectors_GD[pairs.targets_N]
        norms = np.linalg.norm(images, axis=1) * np.linalg.norm(targets, axis=1)
        return np.asarray((images * targets).sum(axis=1) <= self.threshold * norms)


class Verify(Settings):
    """Filter that drops images that the foundation model calls right with more than `threshold`."""

    type: Literal["verify"] = "verify"
    threshold: float = Field(0.5, gt=0, lt=1)

    def keep(self, pairs: MinedPairs, context: FilterContext) -> Mask:
        return np.array(context.yes_probability(pairs), np.float32) <= self.threshold


class Agreement(Settings):
    """Filter that drops images that a second embedder, at `path`, scores above the target too."""

    type: Literal["agreement"] = "agreement"
    path: str
    """Model directory or hub name of the second embedder; `tiny` is the embedded base model."""

    def keep(self, pairs: MinedPairs, context: FilterContext) -> Mask:
        images_N, targets_N = context.second_model_scores(self.path, pairs)
        return np.asarray(~((pairs.scores_N > pairs.target_scores_N) & (images_N > targets_N)))


FilterConfig = Annotated[
    ScoreMargin | NearDuplicate | Verify | Agreement, Field(discriminator="type")
]


class FilterCount(TypedDict):
    """How many pairs a filter saw and dropped."""

    filter: str
    seen: int
    dropped: int


def apply_filters(
    filters: Sequence[FilterConfig], pairs: MinedPairs, context: FilterContext
) -> tuple[Mask, list[FilterCount]]:
    """Apply the filters in turn. Return which pairs (N,) pass all, and each filter's counts."""
    keep_N: Mask = np.ones(len(pairs.query_index_N), bool)
    counts: list[FilterCount] = []
    for step in filters:
        remaining = np.flatnonzero(keep_N)
        passed = step.keep(pairs.select(keep_N), context) if len(remaining) else np.zeros(0, bool)
        keep_N[remaining[~passed]] = False
        counts.append(
            {"filter": step.type, "seen": len(remaining), "dropped": int((~passed).sum())}
        )
    return keep_N, counts
