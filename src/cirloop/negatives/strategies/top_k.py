"""Ranked mining: the highest-ranked wrong images of the queries the model gets wrong.

The best `negatives_per_query` images ranked above the target, with `extra_ranks` also that many
ranks under it, that are neither the reference, the target, nor another known positive. Source: the
mining step of ReCALL (CVPR 2026, arXiv 2602.01639). Degenerate cases: a query whose target is first
has nothing above it; a gallery with fewer wrong images gives those there are.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from cirloop.negatives.base import CandidateBlock, MiningContext, Strategy, top_eligible
from cirloop.retrieval.arrays import Rows


class TopK(Strategy):
    """The top `negatives_per_query` wrong images ranked above the target."""

    needs_full_gallery: ClassVar[bool] = False
    only_failed_queries: ClassVar[bool] = True
    type: Literal["top_k"] = "top_k"
    extra_ranks: Annotated[int, Field(ge=0)] | Literal["all"] = 0
    """Ranks under the target that are mined as well; `all` = no limit."""

    def choose(self, block: CandidateBlock, context: MiningContext) -> list[Rows]:
        assert block.ranks_BK is not None
        eligible = block.eligible_BK
        if self.extra_ranks != "all":
            eligible = eligible & (
                block.ranks_BK <= block.target_rank_B[:, None] + self.extra_ranks
            )
        return top_eligible(block, eligible, self.negatives_per_query)
