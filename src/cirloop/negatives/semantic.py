"""Semantic mining: images close to the query that do not do what its text asks.

Let s(q, x) be the score by which images are ranked, of the whole query, and m(q, x) the similarity of image x to the
modification text alone. Among the `window` best-ranked wrong images, those with

    m(q, x) <= m(q, target) - margin

fit the text worse than the target does, and the `k` of them with the best s are kept: they look right for the
reference's sake. What fits the text as well as the target does is more often an unlabelled positive.

Degenerate cases: a text that the target fits no better than the window does gives nothing; `margin` 0 takes an image
that fits the text exactly as well as the target.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from cirloop.negatives.base import About, Block, Mask, Rows, Strategy, hardest
from cirloop.negatives.online_hardest import most_similar

QUERIES = 256
"""Queries whose similarities to the whole gallery are in memory at once."""


class Semantic(Strategy):
    """The `k` best-scored images that fit the modification text worse than the target."""

    whole: ClassVar[bool] = False
    type: Literal["semantic"] = "semantic"
    window: int = Field(100, ge=1)
    """Best-ranked wrong images looked at, in images."""
    margin: float = Field(0.05, ge=0)
    """How much less similar to the text than the target an image must be, in cosine."""

    @property
    def depth(self) -> int:
        """Allowed candidates to search: the window."""
        return self.window

    def choose(self, block: Block, about: About) -> list[Rows]:
        """Up to `k` images, best-scored first. Raises UserError where the texts' similarities are not known."""
        return hardest(block, self._unfit(block, about), self.k)

    def sets(self, block: Block, about: About) -> list[Rows]:
        """The images of the window that fit the text worse."""
        return hardest(block, self._unfit(block, about), self.window)

    def _unfit(self, block: Block, about: About) -> Mask:
        about.need(self.type, text_scores="similarities of the images to the modification texts alone")
        unfit_BK = most_similar(block, self.window)
        for start in range(0, len(unfit_BK), QUERIES):
            part = slice(start, start + QUERIES)
            fit_NG = about.text_scores(block.numbers_B[part])
            target_N1 = np.take_along_axis(fit_NG, block.target_B[part, None], axis=1)
            # Column -1 reads the last image's similarity; no such position is allowed.
            fit_NK = np.take_along_axis(fit_NG, block.columns_BK[part], axis=1)
            unfit_BK[part] &= fit_NK <= target_N1 - self.margin
        return unfit_BK
