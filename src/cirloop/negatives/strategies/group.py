"""The query's own group: images that annotators saw beside the reference, because they look alike.

CIRR (Liu et al., ICCV 2021, arXiv 2108.04125) wrote its texts within sets of six similar images, so
that a text tells its target from the rest of the set. Kept are the best-scored images of the set
that are neither the target, a known positive nor, unless asked for, the reference: four or five at
most. Degenerate cases: an image of the group that the gallery lacks is left out; a query without a
group gives nothing.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np

from cirloop.negatives.base import CandidateBlock, MiningContext, Strategy, top_eligible
from cirloop.retrieval.arrays import Rows


class Group(Strategy):
    """The `negatives_per_query` best-scored wrong images of the query's group."""

    context_fields: ClassVar[tuple[str, ...]] = ("groups",)
    type: Literal["group"] = "group"

    def choose(self, block: CandidateBlock, context: MiningContext) -> list[Rows]:
        context.require(self.type, groups="the image groups of a data set like CIRR")
        assert context.groups is not None
        eligible_BK = np.zeros_like(block.eligible_BK)
        for i, query in enumerate(block.query_index_B):
            eligible_BK[i] = block.eligible_BK[i] & np.isin(
                block.gallery_index_BK[i], list(context.groups[query])
            )
        return top_eligible(block, eligible_BK, self.negatives_per_query)
