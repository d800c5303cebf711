"""In-batch mining: the targets of the other queries of a batch, as contrastive training takes them.

The queries are shuffled once by the seed and cut into batches of `batch_size`; a query's candidates
are the targets of its batch, and the `negatives_per_query` best-scored of them are kept. What
InfoNCE (arXiv 1807.03748) has for nothing, and so the control that shows what mining the gallery
adds.

Degenerate cases: the last batch is smaller where the queries do not divide, and one left alone in
it gives nothing; an image that is the target of two queries counts once.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from cirloop.negatives.base import CandidateBlock, MiningContext, Strategy, top_eligible
from cirloop.retrieval.arrays import Mask, Rows
from cirloop.types import UserError


class InBatch(Strategy):
    """The `negatives_per_query` best-scored targets of the other queries in a random batch."""

    type: Literal["in_batch"] = "in_batch"
    batch_size: int = Field(48, ge=2)
    """Queries per batch."""

    def choose(self, block: CandidateBlock, context: MiningContext) -> list[Rows]:
        """Up to `negatives_per_query` other targets of the batch, best-scored first. Raises
        UserError where no targets are known."""
        return top_eligible(block, self._others(block, context), self.negatives_per_query)

    def candidate_sets(self, block: CandidateBlock, context: MiningContext) -> list[Rows]:
        """Return the other targets of the batch."""
        return top_eligible(block, self._others(block, context), block.scores_BK.shape[1])

    def _others(self, block: CandidateBlock, context: MiningContext) -> Mask:
        num_queries = len(context.targets_Q)
        if num_queries == 0:
            raise UserError(
                "the negative strategy 'in_batch' needs the target of every query, and was given"
                " none."
            )
        order_Q = np.random.default_rng(context.seed).permutation(num_queries)
        position_Q = np.argsort(order_Q)
        others_BK = np.zeros_like(block.eligible_BK)
        for i, query in enumerate(block.query_index_B):
            start = position_Q[query] // self.batch_size * self.batch_size
            batch = order_Q[start : start + self.batch_size]
            others_BK[i] = np.isin(block.gallery_index_BK[i], context.targets_Q[batch])
        return others_BK & block.eligible_BK
