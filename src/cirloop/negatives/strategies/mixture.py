"""Mixtures: each query's images from several strategies, shared out by weight.

Part i of weight w_i has the quota q_i = k * w_i / sum(w). Per query it gives floor(q_i) or
ceil(q_i) images, `k` in all, by systematic rounding: with Q_i = q_1 + ... + q_i and one draw u from
[0, 1) per query,

    n_i = floor(Q_i + u) - floor(Q_i-1 + u),

so that a part's mean over the queries is its quota exactly, which the largest remainder alone would
not keep.

The parts choose in their order, each from what those before it left, so that no image comes twice;
a part that finds too few is not filled up by another. Degenerate case: a part whose quota is below
one gives many queries nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field, field_validator

from cirloop.config.base import Settings
from cirloop.negatives.base import CandidateBlock, MiningContext, Strategy, sorted_block, top_of
from cirloop.retrieval.arrays import Rows

if TYPE_CHECKING:
    from cirloop.negatives.base import Strategy as AnyStrategy

    # When the program runs it is the union of the strategies, which `model_rebuild` is given once
    # they all exist.


def reject_ignored_settings(strategy: Strategy) -> Strategy:
    """Raise ValueError where a held strategy sets the number of images, which does nothing."""
    name = "negatives_per_query"
    if getattr(strategy, name) != type(strategy).model_fields[name].default:
        raise ValueError(
            f"{name} of the held strategy {strategy.type!r} does nothing; set it on what holds it"
        )
    return strategy


class MixturePart(Settings):
    """A strategy and its weight."""

    weight: float = Field(1.0, gt=0)
    """Share of the images, in relation to the other parts' weights."""
    strategy: AnyStrategy
    """What chooses them; `negatives_per_query` is the mixture's."""

    _share = field_validator("strategy")(reject_ignored_settings)


class Mixture(Strategy):
    """`negatives_per_query` images from several strategies, by weight."""

    type: Literal["mixture"] = "mixture"
    parts: tuple[MixturePart, ...] = Field(min_length=1)
    """The strategies, the first choosing first."""

    @property
    def requires(self) -> set[str]:
        return {name for part in self.parts for name in part.strategy.requires}

    def choose(self, block: CandidateBlock, context: MiningContext) -> list[Rows]:
        """Up to `negatives_per_query` images, best-scored first."""
        return choose_from_parts(
            block,
            context,
            self.negatives_per_query,
            [p.strategy for p in self.parts],
            [p.weight for p in self.parts],
        )


def choose_from_parts(
    block: CandidateBlock,
    context: MiningContext,
    k: int,
    strategies: Sequence[Strategy],
    weights: Sequence[float],
) -> list[Rows]:
    """Choose `k` different images of each query from `strategies` by `weights` (0 = none),
    best-scored first."""
    draws = derived_context(context, 0)
    shared = [allocate(k, weights, draws.rng(int(n)).random()) for n in block.query_index_B]
    num_BP = np.array(shared, np.int64).reshape(-1, len(strategies))
    left_BK = block.eligible_BK.copy()
    for part, strategy in enumerate(strategies):
        for num in np.unique(num_BP[num_BP[:, part] > 0, part]):
            rows = np.flatnonzero(num_BP[:, part] == num)
            resized = strategy.model_copy(update={"negatives_per_query": int(num)})
            rest = replace(block.select(rows), eligible_BK=left_BK[rows])
            chosen = _choose(resized, rest, derived_context(context, part + 1))
            for i, positions in zip(rows, chosen, strict=True):
                left_BK[i, positions] = False
    taken_BK = block.eligible_BK & ~left_BK
    return [
        top_of(scores, np.flatnonzero(row))
        for scores, row in zip(block.scores_BK, taken_BK, strict=True)
    ]


def _choose(strategy: Strategy, block: CandidateBlock, context: MiningContext) -> list[Rows]:
    if strategy.needs_full_gallery or block.ranks_BK is not None:
        return strategy.choose(block, context)
    best_first, order_BK = sorted_block(block)
    chosen = strategy.choose(best_first, context)
    return [order[positions] for order, positions in zip(order_BK, chosen, strict=True)]


def allocate(k: int, weights: Sequence[float], draw: float) -> Rows:
    """Allocate `k` images to the weights: each quota is rounded down or up by `draw`
    from [0, 1)."""
    upto_P = np.cumsum(weights)
    quota_P = k * (upto_P / upto_P[-1])  # of a part and those before it; the last is exactly k
    num_P: Rows = np.diff(np.floor(quota_P + draw), prepend=0).astype(np.int64)
    return num_P


def derived_context(context: MiningContext, part: int) -> MiningContext:
    """Return the context with another seed, so that a part's draws are independent of those that
    allocate `negatives_per_query`."""
    seed = np.random.SeedSequence([context.seed, part]).generate_state(1)[0]
    return replace(context, seed=int(seed))
