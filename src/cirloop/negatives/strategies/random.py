"""Random mining, the control: `negatives_per_query` images drawn evenly from all that may be mined.

The images a query is given have nothing to do with what the model confuses. Degenerate case: a
gallery with fewer than `negatives_per_query` wrong images gives all of them.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from cirloop.negatives.base import CandidateBlock, MiningContext, Strategy, sample_eligible
from cirloop.retrieval.arrays import Rows


class Random(Strategy):
    """`negatives_per_query` random wrong images."""

    only_failed_queries: ClassVar[bool] = True
    type: Literal["random"] = "random"

    def choose(self, block: CandidateBlock, context: MiningContext) -> list[Rows]:
        return sample_eligible(block, block.eligible_BK, self.negatives_per_query, context)
