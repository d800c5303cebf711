"""A mix by category: other items of the target's category, items of other categories, and any.

The shares hold over the queries, for every k: a query takes floor(share * k) images or one more
from each pool, `k` in all, by systematic rounding as in `mixture` with the numbers u = (i + 1/2) /
Q in the place of its draws, where i is the query's place in one seeded shuffle of all Q queries.
The totals over all queries are then the shares of Q * k to within one image; where only some
queries are mined (`mining.only_failed_queries`), they are so in expectation. An image is taken
once; `any` is drawn last, from all that is left. A pool that is too short is not filled from
another. An image of unknown (empty) category is in `any` alone, and a target of unknown category
has no `same` and no `other`. Degenerate case: with one category `other` is empty.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from cirloop.negatives.base import CandidateBlock, MiningContext, Selection, Strategy, top_of
from cirloop.negatives.strategies.mixture import allocate
from cirloop.retrieval.arrays import Floats, Mask, Rows
from cirloop.types import UserError


class CategoryMix(Strategy):
    """`negatives_per_query` images of which a share is of the target's category, a share of others,
    and a share of any."""

    context_fields: ClassVar[tuple[str, ...]] = ("categories",)
    type: Literal["category_mix"] = "category_mix"
    same: float = Field(0.7, ge=0, le=1)
    """Share of other items of the target's category."""
    other: float = Field(0.2, ge=0, le=1)
    """Share of items of other categories."""
    any: float = Field(0.1, ge=0, le=1)
    """Share of items of whatever category."""
    selection: Selection = "random"
    """Which images of a pool: drawn evenly, or the best-scored."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if abs(self.same + self.other + self.any - 1) > 1e-6:
            total = self.same + self.other + self.any
            raise ValueError(
                f"same {self.same}, other {self.other} and any {self.any} must sum to 1, found"
                f" {total:g}"
            )
        return self

    def choose(self, block: CandidateBlock, context: MiningContext) -> list[Rows]:
        context.require(
            self.type,
            categories="a category per image: of the data set, or of negatives.attributes",
        )
        assert context.categories is not None
        categories_G = np.asarray(context.categories, dtype=object)
        known_G = np.asarray(categories_G != "", bool)
        counts_BP = self.num_per_pool(block, context)
        out = []
        for i, query in enumerate(block.query_index_B):
            category = categories_G[block.target_B[i]]
            same_G = known_G & np.asarray(categories_G == category, bool)
            other_G = known_G & ~same_G if category else np.zeros_like(known_G)
            columns_K = block.gallery_index_BK[i]
            draw = context.rng(int(query)) if self.selection == "random" else None
            left_K = block.eligible_BK[i].copy()
            taken = []
            for pool_K, count in zip(
                (same_G[columns_K], other_G[columns_K], True), counts_BP[i], strict=True
            ):
                taken.append(_take(block.scores_BK[i], left_K & pool_K, count, draw))
                left_K[taken[-1]] = False
            out.append(top_of(block.scores_BK[i], np.sort(np.concatenate(taken))))
        return out

    def num_per_pool(self, block: CandidateBlock, context: MiningContext) -> list[list[int]]:
        """Return how many images each query of the block takes from each pool."""
        num_queries = len(context.targets_Q)
        if num_queries == 0:
            raise UserError(
                "the negative strategy 'category_mix' needs the target of every query, and was"
                " given none."
            )
        position_Q = np.random.default_rng(context.seed).permutation(num_queries)
        weights = (self.same, self.other, self.any)
        draw_B = (position_Q[block.query_index_B] + 0.5) / num_queries
        return [allocate(self.negatives_per_query, weights, draw).tolist() for draw in draw_B]


def _take(scores_K: Floats, pool_K: Mask, count: int, draw: np.random.Generator | None) -> Rows:
    """Take at most `count` of a pool: the best-scored, or drawn evenly."""
    positions = np.flatnonzero(pool_K)
    if len(positions) <= count:
        return positions
    if draw is None:
        return top_of(scores_K, positions, count)
    return draw.choice(positions, count, replace=False)
