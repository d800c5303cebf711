"""Ranked mining: the highest-ranked wrong images of the queries the model gets wrong.

The best `k` images ranked above the target, with `below` also that many ranks under it, that are neither the reference,
the target, nor another known positive. Source: the mining step of ReCALL (CVPR 2026, arXiv 2602.01639). Degenerate
cases: a query whose target is first has nothing above it; a gallery with fewer wrong images gives those there are.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from cirloop.negatives.base import About, Block, Rows, Strategy, hardest


class TopK(Strategy):
    """The top `k` wrong images ranked above the target."""

    whole: ClassVar[bool] = False
    type: Literal["top_k"] = "top_k"
    only_wrong: bool = True
    """Mine only for queries whose target is not ranked first."""
    below: Annotated[int, Field(ge=0)] | Literal["all"] = 0
    """Ranks under the target that are mined as well; `all` = no limit."""

    def choose(self, block: Block, about: About) -> list[Rows]:
        assert block.ranks_BK is not None
        eligible = block.allowed_BK
        if self.below != "all":
            eligible = eligible & (block.ranks_BK <= block.target_rank_B[:, None] + self.below)
        return hardest(block, eligible, self.k)
