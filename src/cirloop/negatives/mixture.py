"""Mixtures: each query's images from several strategies, shared out by weight.

Part i of weight w_i has the quota q_i = k * w_i / sum(w). Per query it gives floor(q_i) or ceil(q_i) images, `k` in
all, by systematic rounding: with Q_i = q_1 + ... + q_i and one draw u from [0, 1) per query,

    n_i = floor(Q_i + u) - floor(Q_i-1 + u),

so that a part's mean over the queries is its quota exactly, which the largest remainder alone would not keep.

The parts choose in their order, each from what those before it left, so that no image comes twice; a part that finds
too few is not filled up by another. Degenerate case: a part whose quota is below one gives many queries nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field, field_validator

from cirloop.negatives.base import About, Block, Mask, Rows, Strategy, best_of, ranked
from cirloop.settings import Settings

if TYPE_CHECKING:
    from cirloop.negatives.base import Strategy as AnyStrategy
    # When the program runs it is the union of the strategies, which `model_rebuild` is given once they all exist.


def without_own_share(strategy: Strategy) -> Strategy:
    """A validator: raises ValueError for settings that a held strategy does not decide."""
    for name in ("k", "only_wrong", "reference", "fallback"):
        if getattr(strategy, name) != type(strategy).model_fields[name].default:
            raise ValueError(f"{name} of the held strategy {strategy.type!r} does nothing; set it on what holds it")
    return strategy


class MixturePart(Settings):
    """A strategy and its weight."""

    weight: float = Field(1.0, gt=0)
    """Share of the images, in relation to the other parts' weights."""
    strategy: AnyStrategy
    """What chooses them; `k`, `only_wrong`, `reference` and `fallback` are the mixture's."""

    _share = field_validator("strategy")(without_own_share)


class Mixture(Strategy):
    """`k` images from several strategies, by weight."""

    type: Literal["mixture"] = "mixture"
    parts: tuple[MixturePart, ...] = Field(min_length=1)
    """The strategies, the first choosing first."""

    @property
    def needs(self) -> set[str]:
        return {name for part in self.parts for name in part.strategy.needs}

    def choose(self, block: Block, about: About) -> list[Rows]:
        """Up to `k` images, best-scored first."""
        return chosen(block, about, self.k, [p.strategy for p in self.parts], [p.weight for p in self.parts])


def chosen(block: Block, about: About, k: int, strategies: Sequence[Strategy], weights: Sequence[float]) -> list[Rows]:
    """`k` images of each query from `strategies` by `weights` (0 = none), best-scored first, none twice."""
    draws = branch(about, 0)
    shared = [shares(k, weights, draws.stream(int(n)).random()) for n in block.numbers_B]
    num_BP = np.array(shared, np.int64).reshape(-1, len(strategies))
    left_BK = block.allowed_BK.copy()
    for part, strategy in enumerate(strategies):
        for num in np.unique(num_BP[num_BP[:, part] > 0, part]):
            which = np.flatnonzero(num_BP[:, part] == num)
            asked = strategy.model_copy(update={"k": int(num)})
            found = _ask(asked, some_queries(block, which, left_BK), branch(about, part + 1))
            for i, positions in zip(which, found, strict=True):
                left_BK[i, positions] = False
    taken_BK = block.allowed_BK & ~left_BK
    return [best_of(scores, np.flatnonzero(row), -1) for scores, row in zip(block.scores_BK, taken_BK, strict=True)]


def _ask(strategy: Strategy, block: Block, about: About) -> list[Rows]:
    if strategy.whole or block.ranks_BK is not None:
        return strategy.choose(block, about)
    best_first, order_BK = ranked(block)
    found = strategy.choose(best_first, about)
    return [order[positions] for order, positions in zip(order_BK, found, strict=True)]


def shares(k: int, weights: Sequence[float], draw: float) -> Rows:
    """How many of `k` each weight gets: its quota rounded down or up by `draw` from [0, 1), `k` in all."""
    upto_P = np.cumsum(weights)
    quota_P = k * (upto_P / upto_P[-1])  # of a part and those before it; the last is exactly k
    num_P: Rows = np.diff(np.floor(quota_P + draw), prepend=0).astype(np.int64)
    return num_P


def branch(about: About, part: int) -> About:
    """The same knowledge with random numbers of its own: no draw of a part may hang on what shared out `k`."""
    seed = np.random.SeedSequence([about.seed, part]).generate_state(1)[0]
    return replace(about, seed=int(seed))


def some_queries(block: Block, which: Rows, allowed_BK: Mask) -> Block:
    """The queries `which` of a block, with other allowed candidates."""
    columns_BK = block.columns_BK
    if columns_BK.strides[0] == 0:  # one row in memory for all queries, and it stays one
        columns_BK = np.broadcast_to(columns_BK[0], (len(which), columns_BK.shape[1]))
    else:
        columns_BK = columns_BK[which]
    return Block(
        numbers_B=block.numbers_B[which],
        columns_BK=columns_BK,
        scores_BK=block.scores_BK[which],
        allowed_BK=allowed_BK[which],
        target_B=block.target_B[which],
        target_score_B=block.target_score_B[which],
        target_rank_B=block.target_rank_B[which],
        ranks_BK=None if block.ranks_BK is None else block.ranks_BK[which],
    )
