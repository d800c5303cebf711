"""Images that look like the target but differ in what the text asks for.

Of a query's candidates those that are known to differ from what is wanted in at least one attribute
that its text asks for, the most similar to the target first: the dot product of the two unit
vectors, ties by gallery row. Wanted is the value the text names or the target's own
(`attributes.values.compare_values`). An unknown attribute is no mismatch. Assumption: visual
neighbours that miss the requested change are the errors a model makes that ignores the text.
Degenerate cases: a text that asks for nothing known gives nothing; so does a gallery without known
attributes.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from cirloop.negatives.attributes.eligible import eligible_by_attributes
from cirloop.negatives.base import CandidateBlock, MiningContext, Strategy
from cirloop.retrieval.arrays import Floats, Mask, Rows
from cirloop.retrieval.dense import all_scores


class CategoryDiscrepant(Strategy):
    """The `negatives_per_query` images most like the target that differ in an attribute the text
    asks for."""

    context_fields: ClassVar[tuple[str, ...]] = ("attributes",)
    type: Literal["category_discrepant"] = "category_discrepant"
    min_similarity: float = Field(-1.0, ge=-1, le=1)
    """Least cosine similarity to the target; -1 = any."""

    def choose(self, block: CandidateBlock, context: MiningContext) -> list[Rows]:
        vectors_GD = "the gallery's vectors"
        eligible_BK = eligible_by_attributes(
            self.type,
            block,
            context,
            lambda agreement: agreement.requested_differ_G > 0,
            vectors_GD=vectors_GD,
        )
        assert context.vectors_GD is not None
        near_BG = all_scores(context.vectors_GD[block.target_B], context.vectors_GD)
        return [
            self._nearest(block, i, eligible_K, near_BG[i], context.vectors_GD)
            for i, eligible_K in enumerate(eligible_BK)
        ]

    def _nearest(
        self, block: CandidateBlock, i: int, eligible_K: Mask, near_G: Floats, vectors_GD: Floats
    ) -> Rows:
        """Return the best positions by exact similarity: the rounding of a block's product decides
        nothing."""
        positions = np.flatnonzero(eligible_K)
        columns = block.gallery_index_BK[i, positions]
        if len(positions) > self.negatives_per_query:
            kth = np.partition(near_G[columns], -self.negatives_per_query)
            # 1e-3 is beyond any rounding of unit vectors
            edge = kth[-self.negatives_per_query] - 1e-3
            positions = positions[near_G[columns] >= edge]
            columns = columns[near_G[columns] >= edge]
        target_D = np.asarray(vectors_GD[block.target_B[i]], np.float64)
        exact = (np.asarray(vectors_GD[columns], np.float64) * target_D).sum(axis=1)
        order = np.lexsort((columns, -exact))
        order = order[exact[order] >= self.min_similarity]
        best: Rows = positions[order[: self.negatives_per_query]]
        return best
