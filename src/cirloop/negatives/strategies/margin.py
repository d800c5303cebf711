"""Positive-aware mining: the best-ranked images that score clearly lower than the target.

NV-Retriever (arXiv 2407.15831, section 3.2): candidates scored above a limit set by the target are
taken for false negatives and left out: `absolute_margin` m: s <= pos - m; `relative_margin` m: s <=
pos - |pos| * m, which is right for negative scores too. Qwen's: s <= mean(pos) + delta over all
queries, `mean_delta`. Beside them windows of ranks and scores, as in sentence-transformers'
`mine_hard_negatives`. The limits that are set hold together.

Ranks count the images that may be mined, best first from 0: `range_min` skips so many, `range_max`
is where the window ends. Degenerate cases: no limit set = the best-ranked wrong images; a window
without candidates gives nothing.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from cirloop.negatives.base import CandidateBlock, MiningContext, Selection, Strategy, select
from cirloop.retrieval.arrays import Rows

WINDOW = 10
"""Candidates looked at per image asked for, where a limit is set and `range_max` is not."""


class Margin(Strategy):
    """The best images under a limit that the target's score sets."""

    needs_full_gallery: ClassVar[bool] = False
    type: Literal["margin"] = "margin"
    absolute_margin: float | None = Field(None, ge=0)
    """Cosine that a negative must score below the target."""
    relative_margin: float | None = Field(None, ge=0)
    """The same as a share of the target's |score|."""
    mean_delta: float | None = None
    """A negative scores at most the mean of all targets' scores plus this."""
    min_score: float | None = None
    """Least score of an image."""
    max_score: float | None = None
    """Largest score of an image."""
    range_min: int = Field(0, ge=0)
    """Best-ranked candidates that are skipped."""
    range_max: int | None = Field(None, ge=1)
    """Candidates looked at; by default 10 per image asked for and one more where a limit is set."""
    selection: Selection = "hardest"
    """Which of the images under the limit are taken."""

    @model_validator(mode="after")
    def _ordered(self) -> Margin:
        if self.depth < self.range_min + self.negatives_per_query:
            raise ValueError(
                f"range_max {self.range_max} leaves fewer than negatives_per_query "
                f"{self.negatives_per_query} after range_min {self.range_min}"
            )
        return self

    @property
    def depth(self) -> int:
        if self.range_max is not None:
            return self.range_max
        limits = (
            self.absolute_margin,
            self.relative_margin,
            self.mean_delta,
            self.min_score,
            self.max_score,
        )
        limited = any(limit is not None for limit in limits)
        num_candidates = (
            WINDOW * self.negatives_per_query + 1 if limited else self.negatives_per_query
        )
        return self.range_min + num_candidates

    def choose(self, block: CandidateBlock, context: MiningContext) -> list[Rows]:
        target_B1 = block.target_score_B[:, None]
        limit_B1 = np.full_like(target_B1, np.inf)
        if self.absolute_margin is not None:
            limit_B1 = np.minimum(limit_B1, target_B1 - np.float32(self.absolute_margin))
        if self.relative_margin is not None:
            limit_B1 = np.minimum(
                limit_B1, target_B1 - np.abs(target_B1) * np.float32(self.relative_margin)
            )
        if self.mean_delta is not None:
            context.require(self.type, mean_target_score="the mean score of all targets")
            limit_B1 = np.minimum(
                limit_B1, np.float32(context.mean_target_score or 0.0) + np.float32(self.mean_delta)
            )
        if self.max_score is not None:
            limit_B1 = np.minimum(limit_B1, np.float32(self.max_score))
        place_BK = block.eligible_BK.cumsum(axis=1) - 1
        eligible = block.eligible_BK & (block.scores_BK <= limit_B1)
        eligible &= (place_BK >= self.range_min) & (place_BK < self.depth)
        if self.min_score is not None:
            eligible &= block.scores_BK >= np.float32(self.min_score)
        return select(self.selection, block, eligible, self.negatives_per_query, context)
