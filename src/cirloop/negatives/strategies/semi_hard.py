"""Semi-hard mining: wrong images scored below the target, yet within a margin of it.

FaceNet (arXiv 1503.03832, section 3.2, eq. 4) takes negatives farther from the anchor than the
positive whose distance still lies inside the margin, because the very hardest ones can collapse
training early on. For scores s of a query:

    target - margin < s < target

Degenerate cases: an image scored as the target is, or exactly `margin` below it, is not taken; a
query whose target is scored lowest, or has none that close below it, gives nothing.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cirloop.negatives.base import (
    CandidateBlock,
    MiningContext,
    Selection,
    Strategy,
    select,
    top_eligible,
)
from cirloop.retrieval.arrays import Mask, Rows


class SemiHard(Strategy):
    """`negatives_per_query` images scored less than `margin` below the target."""

    type: Literal["semi_hard"] = "semi_hard"
    margin: float = Field(0.2, gt=0)
    """Width of the band below the target's score, in cosine."""
    selection: Selection = "hardest"
    """Which of the band: the best-scored, or random ones."""

    def choose(self, block: CandidateBlock, context: MiningContext) -> list[Rows]:
        """Up to `negatives_per_query` of the band, best-scored first."""
        return select(self.selection, block, self._band(block), self.negatives_per_query, context)

    def candidate_sets(self, block: CandidateBlock, context: MiningContext) -> list[Rows]:
        """Return the band."""
        return top_eligible(block, self._band(block), block.scores_BK.shape[1])

    def _band(self, block: CandidateBlock) -> Mask:
        target_B1 = block.target_score_B[:, None]
        near_BK: Mask = (block.scores_BK > target_B1 - self.margin) & (block.scores_BK < target_B1)
        return near_BK & block.eligible_BK
