"""Semantic mining: images close to the query that do not do what its text asks.

Let s(q, x) be the score by which images are ranked, of the whole query, and m(q, x) the similarity
of image x to the modification text alone. Among the `candidate_pool` best-ranked wrong images,
those with

    m(q, x) <= m(q, target) - margin

fit the text worse than the target does, and the `negatives_per_query` of them with the best s are
kept: they look right for the reference's sake. What fits the text as well as the target does is
more often an unlabelled positive.

Degenerate cases: a text that the target fits no better than the window does gives nothing; `margin`
0 takes an image that fits the text exactly as well as the target.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from cirloop.negatives.base import CandidateBlock, MiningContext, Strategy, top_eligible
from cirloop.negatives.strategies.online_hardest import most_similar
from cirloop.retrieval.arrays import Mask, Rows

QUERIES = 256
"""Queries whose similarities to the whole gallery are in memory at once."""


class Semantic(Strategy):
    """The `negatives_per_query` best-scored images that fit the modification text worse than the
    target."""

    needs_full_gallery: ClassVar[bool] = False
    type: Literal["semantic"] = "semantic"
    candidate_pool: int = Field(100, ge=1)
    """Best-ranked wrong images looked at, in images."""
    margin: float = Field(0.05, ge=0)
    """How much less similar to the text than the target an image must be, in cosine."""

    @property
    def depth(self) -> int:
        """Allowed candidates to search: the window."""
        return self.candidate_pool

    def choose(self, block: CandidateBlock, context: MiningContext) -> list[Rows]:
        """Up to `negatives_per_query` images, best-scored first. Raises UserError where the texts'
        similarities are not known."""
        return top_eligible(block, self._unfit(block, context), self.negatives_per_query)

    def candidate_sets(self, block: CandidateBlock, context: MiningContext) -> list[Rows]:
        """Return the images of the window that fit the text worse."""
        return top_eligible(block, self._unfit(block, context), self.candidate_pool)

    def _unfit(self, block: CandidateBlock, context: MiningContext) -> Mask:
        context.require(
            self.type, text_scores="similarities of the images to the modification texts alone"
        )
        unfit_BK = most_similar(block, self.candidate_pool)
        for start in range(0, len(unfit_BK), QUERIES):
            part = slice(start, start + QUERIES)
            assert context.text_scores is not None  # `require` raises
            fit_NG = context.text_scores(block.query_index_B[part])
            target_N1 = np.take_along_axis(fit_NG, block.target_B[part, None], axis=1)
            # Column -1 reads the last image's similarity; no such position is allowed.
            fit_NK = np.take_along_axis(fit_NG, block.gallery_index_BK[part], axis=1)
            unfit_BK[part] &= fit_NK <= target_N1 - self.margin
        return unfit_BK
