"""False-negative filters: named steps after any strategy, each with a count of what it dropped.

An image that is right but not annotated spoils what is learnt from it. A filter sees pairs of a
query and a mined image and says which to keep; it never sees what is right. N pairs.

- `score_margin`: keeps what scores at most the target's score less `margin` (NV-Retriever, arXiv
  2407.15831).
- `near_duplicate`: drops images whose vector has a cosine above `threshold` with the target's:
  another picture of it.
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
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from cirloop.config.base import Settings

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class MinedPairs:
    """Mined images: query numbers and gallery rows (N,), their scores and their targets' rows and
    scores."""

    numbers_N: Rows
    columns_N: Rows
    scores_N: Floats
    targets_N: Rows
    target_scores_N: Floats

    def of(self, keep_N: Mask) -> MinedPairs:
        return MinedPairs(*(getattr(self, name)[keep_N] for name in self.__dataclass_fields__))


@dataclass(frozen=True, slots=True)
class FilterContext:
    """What filters may ask: vectors of the gallery, P(yes) of pairs, and a second model's (image,
    target) scores."""

    vectors_GD: Floats
    yes_probability: Callable[[MinedPairs], Sequence[float]]
    second_model_scores: Callable[[str, MinedPairs], tuple[Floats, Floats]]


class ScoreMargin(Settings):
    """Keeps images that score at most the target's score less `margin`."""

    type: Literal["score_margin"] = "score_margin"
    margin: float = 0.0

    def keep(self, pairs: MinedPairs, context: FilterContext) -> Mask:
        return np.asarray(pairs.scores_N <= pairs.target_scores_N - np.float32(self.margin))


class NearDuplicate(Settings):
    """Drops images more alike the target than `threshold`, in cosine of gallery vectors."""

    type: Literal["near_duplicate"] = "near_duplicate"
    threshold: float = Field(0.95, gt=-1, le=1)

    def keep(self, pairs: MinedPairs, context: FilterContext) -> Mask:
        images = context.vectors_GD[pairs.columns_N]
        targets = context.vectors_GD[pairs.targets_N]
        norms = np.linalg.norm(images, axis=1) * np.linalg.norm(targets, axis=1)
        return np.asarray((images * targets).sum(axis=1) <= self.threshold * norms)


class Verify(Settings):
    """Drops images that the foundation model takes for right with more than `threshold`."""

    type: Literal["verify"] = "verify"
    threshold: float = Field(0.5, gt=0, lt=1)

    def keep(self, pairs: MinedPairs, context: FilterContext) -> Mask:
        return np.array(context.yes_probability(pairs), np.float32) <= self.threshold


class Agreement(Settings):
    """Drops images that a second embedder, at `path`, scores above the target too."""

    type: Literal["agreement"] = "agreement"
    path: str
    """Model directory or hub name of the second embedder; `tiny` is the embedded base model."""

    def keep(self, pairs: MinedPairs, context: FilterContext) -> Mask:
        images_N, targets_N = context.second_model_scores(self.path, pairs)
        return np.asarray(~((pairs.scores_N > pairs.target_scores_N) & (images_N > targets_N)))


FilterConfig = Annotated[
    ScoreMargin | NearDuplicate | Verify | Agreement, Field(discriminator="type")
]


def apply_filters(
    filters: Sequence[FilterConfig], pairs: MinedPairs, context: FilterContext
) -> tuple[Mask, list[dict[str, Any]]]:
    """Which pairs (N,) pass every filter, one after the other, and what each saw and dropped."""
    keep_N: Mask = np.ones(len(pairs.numbers_N), bool)
    counts: list[dict[str, Any]] = []
    for each in filters:
        left = np.flatnonzero(keep_N)
        passed = each.keep(pairs.of(keep_N), context) if len(left) else np.zeros(0, bool)
        keep_N[left[~passed]] = False
        counts.append({"filter": each.type, "seen": len(left), "dropped": int((~passed).sum())})
    return keep_N, counts
