"""Images near the reference, whatever the query confuses: the control of mining, and a source of
pairs to write texts for.

Let g(x, y) be the similarity of the embeddings of two images. Of the eligible images the
`candidate_pool` most similar to the reference are the window, and `negatives_per_query` of it are
drawn at random. The text plays no part, so a query that is solved has as many as one that is not:
there is always something left to write.

Degenerate cases: a query whose reference is not in the gallery has no images.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from cirloop.negatives.base import CandidateBlock, MiningContext, Strategy, sample_from
from cirloop.retrieval.arrays import Rows
from cirloop.retrieval.dense import all_scores, best_positions


class NearReference(Strategy):
    """`negatives_per_query` random images of those most similar to the reference."""

    type: Literal["near_reference"] = "near_reference"
    candidate_pool: int = Field(10, ge=1)
    """Images most similar to the reference that are drawn from, in images."""

    def choose(self, block: CandidateBlock, context: MiningContext) -> list[Rows]:
        """Draw from each query's window. Raises UserError where the references are not known."""
        return sample_from(
            block, self.candidate_sets(block, context), self.negatives_per_query, context
        )

    def candidate_sets(self, block: CandidateBlock, context: MiningContext) -> list[Rows]:
        """Return the window of each query."""
        context.require(
            self.type,
            references_Q="--references, the gallery rows of the queries' references",
            vectors_GD="the vectors of the gallery",
        )
        assert context.references_Q is not None
        assert context.vectors_GD is not None
        references_B = context.references_Q[block.query_index_B]
        scores_BG = all_scores(context.vectors_GD[references_B], context.vectors_GD)
        windows = []
        for reference, scores_G, rows_K, eligible_K in zip(
            references_B, scores_BG, block.gallery_index_BK, block.eligible_BK, strict=True
        ):
            positions = np.flatnonzero(eligible_K) if reference >= 0 else np.zeros(0, np.int64)
            best = best_positions(scores_G[rows_K[positions]], self.candidate_pool)
            windows.append(np.sort(positions[best]))
        return windows
