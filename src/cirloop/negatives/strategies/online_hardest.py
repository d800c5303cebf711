"""Online hardest mining: the hardest valid ones among a query's most similar candidates.

Of the `candidate_pool` most similar wrong images of a query, those scored at most `margin` above
its target,

    s <= target + margin,

are valid: what outscores the target by more is more often an unlabelled positive than a mistake of
the model, the case against taking negatives by score alone in NV-Retriever (arXiv 2407.15831; its
TopK-MarginPos is a negative `margin` here). The `negatives_per_query` best-scored valid ones are
kept. `training.hard_candidates.hard_candidate_mask` is the same rule over a training batch's
candidates.

Degenerate cases: a query all of whose pool outscores its target gives nothing, however many valid
images lie beyond; with `validity: all` the result is the `negatives_per_query` best-ranked wrong
images.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from cirloop.negatives.base import CandidateBlock, MiningContext, Strategy, top_eligible
from cirloop.retrieval.arrays import Mask, Rows


class OnlineHardest(Strategy):
    """The `negatives_per_query` best-scored valid images among the `candidate_pool` most similar
    ones."""

    needs_full_gallery: ClassVar[bool] = False
    type: Literal["online_hardest"] = "online_hardest"
    candidate_pool: int = Field(50, ge=1)
    """Most similar wrong images looked at, in images."""
    validity: Literal["below_target", "all"] = "below_target"
    """Which of the pool may be taken: those scored at most `margin` above the target, or all."""
    margin: float = 0.0
    """What a valid image may score above the target, in cosine; negative: what it must lie
    below."""

    @model_validator(mode="after")
    def _margin_is_used(self) -> OnlineHardest:
        if self.validity == "all" and self.margin != 0:
            raise ValueError(
                f"margin {self.margin} does nothing with validity: all; leave it out, or use"
                " below_target"
            )
        return self

    @property
    def depth(self) -> int:
        """Allowed candidates to search: the pool."""
        return self.candidate_pool

    def choose(self, block: CandidateBlock, context: MiningContext) -> list[Rows]:
        """Up to `negatives_per_query` valid images of the pool, best-scored first."""
        return top_eligible(block, self._valid(block), self.negatives_per_query)

    def candidate_sets(self, block: CandidateBlock, context: MiningContext) -> list[Rows]:
        """Return the valid images of the pool."""
        return top_eligible(block, self._valid(block), self.candidate_pool)

    def _valid(self, block: CandidateBlock) -> Mask:
        pool_BK = most_similar(block, self.candidate_pool)
        if self.validity == "below_target":
            pool_BK &= block.scores_BK <= block.target_score_B[:, None] + self.margin
        return pool_BK


def most_similar(block: CandidateBlock, count: int) -> Mask:
    """(B, K): True for the `count` best-scored allowed candidates of each query, ties by gallery
    row."""
    best_BK = np.zeros(block.eligible_BK.shape, bool)
    for row, positions in zip(best_BK, top_eligible(block, block.eligible_BK, count), strict=True):
        row[positions] = True
    return best_BK
