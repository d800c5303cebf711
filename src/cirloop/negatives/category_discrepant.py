"""Images that look like the target but differ in what the text asks for.

Of a query's candidates those that are known to differ from what is wanted in at least one attribute that its text asks
for, the most similar to the target first: the dot product of the two unit vectors, ties by gallery row. Wanted is the
value the text names or the target's own (`attributes.values.verdict`). An unknown attribute is no mismatch.
Assumption: visual neighbours that miss the requested change are the errors a model makes that ignores the text.
Degenerate cases: a text that asks for nothing known gives nothing; so does a gallery without known attributes.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from cirloop.negatives.attributes.fitting import fitting
from cirloop.negatives.base import About, Block, Floats, Mask, Rows, Strategy

CHUNK = 1 << 24
"""Vector elements converted at once."""


class CategoryDiscrepant(Strategy):
    """The `k` images most like the target that differ in an attribute the text asks for."""

    knowledge: ClassVar[tuple[str, ...]] = ("attributes",)
    type: Literal["category_discrepant"] = "category_discrepant"
    least_similarity: float = Field(-1.0, ge=-1, le=1)
    """Least cosine similarity to the target; -1 = any."""

    def choose(self, block: Block, about: About) -> list[Rows]:
        vectors_GD = "the gallery's vectors"
        eligible_BK = fitting(self.type, block, about, lambda found: found.asked_differ_G > 0, vectors_GD=vectors_GD)
        assert about.vectors_GD is not None
        near_BG = similarities(about.vectors_GD, block.target_B)
        return [
            self._nearest(block, i, eligible_K, near_BG[i], about.vectors_GD)
            for i, eligible_K in enumerate(eligible_BK)
        ]

    def _nearest(self, block: Block, i: int, eligible_K: Mask, near_G: Floats, vectors_GD: Floats) -> Rows:
        """Positions of the best by exact similarity, so that no choice hangs on the rounding of a block's product."""
        found = np.flatnonzero(eligible_K)
        columns = block.columns_BK[i, found]
        if len(found) > self.k:
            edge = np.partition(near_G[columns], -self.k)[-self.k] - 1e-3  # beyond any rounding of unit vectors
            found, columns = found[near_G[columns] >= edge], columns[near_G[columns] >= edge]
        target_D = np.asarray(vectors_GD[block.target_B[i]], np.float64)
        exact = (np.asarray(vectors_GD[columns], np.float64) * target_D).sum(axis=1)
        order = np.lexsort((columns, -exact))
        order = order[exact[order] >= self.least_similarity]
        best: Rows = found[order[: self.k]]
        return best


def similarities(vectors_GD: Floats, rows_B: Rows) -> Floats:
    """Dot products (B, G) of some rows with all, in float32, the gallery read in pieces."""
    chosen_DB = np.asarray(vectors_GD[rows_B], np.float32).T
    out = np.empty((len(rows_B), len(vectors_GD)), np.float32)
    step = max(1, CHUNK // max(1, vectors_GD.shape[1]))
    for start in range(0, len(vectors_GD), step):
        out[:, start : start + step] = (np.asarray(vectors_GD[start : start + step], np.float32) @ chosen_DB).T
    return out
