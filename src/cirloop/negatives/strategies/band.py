"""Band mining, QuRe's set of hard negatives: the images between the two steepest drops of the
scores after the target.

Let `tail` be the images ranked below the target, best first (ties by gallery row), and drop i the
fall from tail[i] to tail[i + 1]. Of the two largest drops (ties: the earlier) let low < high be the
positions; the set is tail[low + 1 .. high]. Before the first cliff lie images that may be right,
after the second those that teach nothing. One image is drawn from the set per query; in the first
floor(T / n_def) of T rounds the set is all images but the target, then it is defined anew every
floor(T / n_def) rounds, and drawn from in between (QuRe, ICML 2025, arXiv 2507.12416: epochs and
n_def 6).

`released` is the rule of the authors' code: the two drops must be more than one position apart,
else the next pair in order of size is tried. Where the released code keeps the bounds of the query
before (no such pair, or a tail too short to have two drops), ours takes the whole tail and counts
the query.

Degenerate cases: a tail of fewer than three images has no two drops: the whole tail. Where all
drops are alike (a straight line, tied scores) the earliest two count and the set is tail[1].
Nothing below the target: no images.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
from pydantic import Field

from cirloop.negatives.base import (
    CandidateBlock,
    MiningContext,
    Selection,
    Strategy,
    sample_from,
    select,
    top_of,
)
from cirloop.retrieval.arrays import Floats, Mask, Rows

CACHED = 1 << 18
"""Scores worked on at once by a thread: what its processor keeps close."""
APART = 1
"""Positions that the released code wants more than between the two drops."""


class Band(Strategy):
    """Images between the two steepest drops after the target."""

    type: Literal["band"] = "band"
    negatives_per_query: int = Field(1, ge=1)
    """Images drawn from the set per query."""
    variant: Literal["paper", "released"] = "paper"
    """The band as the paper defines it, or as the released code does."""
    selection: Selection = "random"
    """Which images of the band are taken."""
    n_def: int | None = Field(None, ge=1)
    """How often the sets are defined in a run of T rounds: every floor(T / n_def) rounds; by
    default in every round."""
    full_set_rounds: int | None = Field(None, ge=0)
    """First rounds in which the set is every image but the target; by default floor(T / n_def),
    without `n_def` 0."""

    def refresh_every(self, rounds: int) -> int:
        return 1 if self.n_def is None else max(1, rounds // self.n_def)

    def choose(self, block: CandidateBlock, context: MiningContext) -> list[Rows]:
        inside_BK = self.inside(block, context)
        return select(self.selection, block, inside_BK, self.negatives_per_query, context)

    def candidate_sets(self, block: CandidateBlock, context: MiningContext) -> list[Rows]:
        return [np.flatnonzero(row) for row in self.inside(block, context)]

    def choose_from(
        self, block: CandidateBlock, context: MiningContext, sets: Sequence[Rows]
    ) -> list[Rows]:
        if self.selection == "hardest":
            k = self.negatives_per_query
            return [top_of(s, inside, k) for s, inside in zip(block.scores_BK, sets, strict=True)]
        return sample_from(block, sets, self.negatives_per_query, context)

    def set_stats(
        self, block: CandidateBlock, context: MiningContext, sets: Sequence[Rows]
    ) -> dict[str, int]:
        """`whole_tail`: queries without two cliffs, whose set is all below the target; a band never
        holds tail[0]."""
        sizes_B = np.array([len(inside) for inside in sets], np.int64)
        # Length of the tail, or less.
        least_B = np.count_nonzero(block.eligible_BK, axis=1) - (block.target_rank_B - 1)
        likely = np.flatnonzero((sizes_B > 0) & (sizes_B >= least_B))
        tails_B = np.count_nonzero(below_target(block.select(likely)), axis=1)
        return {"whole_tail": int(np.count_nonzero(sizes_B[likely] == tails_B))}

    def inside(self, block: CandidateBlock, context: MiningContext) -> Mask:
        """Return which candidates (B, K) are in the set."""
        default = 0 if self.n_def is None else self.refresh_every(context.rounds)
        if context.iteration < (default if self.full_set_rounds is None else self.full_set_rounds):
            return block.eligible_BK
        inside_BK = np.empty_like(block.eligible_BK)

        def fill(rows: slice) -> None:
            part = block.select(rows)
            inside_BK[rows] = band(part.scores_BK, below_target(part), self.variant)

        size = max(1, CACHED // block.scores_BK.shape[1])
        parts = [slice(start, start + size) for start in range(0, len(inside_BK), size)]
        # numpy sorts and compares without the interpreter's lock
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(fill, parts))
        return inside_BK


def below_target(block: CandidateBlock) -> Mask:
    """Return the eligible candidates (B, K) ranked after the target: scored lower, or as high
    with a later gallery row."""
    target_B1 = block.target_score_B[:, None]
    below_BK = np.asarray(block.eligible_BK & (block.scores_BK < target_B1))
    tied_BK = block.eligible_BK & (block.scores_BK == target_B1)
    for b in np.flatnonzero(tied_BK.any(axis=1)):
        below_BK[b] |= tied_BK[b] & (block.gallery_index_BK[b] > block.target_B[b])
    return below_BK


def band(scores_BK: Floats, tail_BK: Mask, variant: Literal["paper", "released"]) -> Mask:
    """Return the set (B, K) of each query, from scores in the gallery's order and the images of the
    tail.

    Rows are sorted by value alone; that decides wherever both drops are falls. The few others are
    done one by one.
    """
    sorted_BK = -np.sort(np.where(tail_BK, -scores_BK, np.inf), axis=1)
    num_B = np.count_nonzero(tail_BK, axis=1)
    inside_BK = np.zeros_like(tail_BK)
    inside_BK[num_B < 3] = tail_BK[num_B < 3]
    long_B = np.flatnonzero(num_B >= 3)
    if not len(long_B):
        return inside_BK
    low_B, high_B, exists_B = _bounds(sorted_BK[long_B], num_B[long_B], variant)
    inside_BK[long_B[~exists_B]] = tail_BK[long_B[~exists_B]]
    long_B = long_B[exists_B]
    low_B = low_B[exists_B]
    high_B = high_B[exists_B]
    values_BK = sorted_BK[long_B]
    query_B = np.arange(len(long_B))
    top_B = values_BK[query_B, low_B + 1]
    bottom_B = values_BK[query_B, high_B]
    scores = scores_BK[long_B]
    inside_BK[long_B] = tail_BK[long_B] & (scores <= top_B[:, None]) & (scores >= bottom_B[:, None])
    # A bound inside a tie.
    level = (values_BK[query_B, low_B] == top_B) | (values_BK[query_B, high_B + 1] == bottom_B)
    for b, low, high in zip(long_B[level], low_B[level], high_B[level], strict=True):
        tail = top_of(scores_BK[b], np.flatnonzero(tail_BK[b]))
        inside_BK[b] = False
        inside_BK[b, tail[low + 1 : high + 1]] = True
    return inside_BK


def _bounds(sorted_BK: Floats, num_B: Rows, variant: str) -> tuple[Rows, Rows, Mask]:
    """Return low, high (B,) and whether they exist; `sorted_BK` descends, and holds -inf from
    position `num_B` on."""
    with np.errstate(invalid="ignore"):  # -inf less -inf, beyond the tail
        drops_BK = sorted_BK[:, :-1] - sorted_BK[:, 1:]
    drops_BK[np.arange(drops_BK.shape[1]) >= (num_B - 1)[:, None]] = -1.0
    query_B = np.arange(len(drops_BK))
    first_B = drops_BK.argmax(axis=1)
    first_drop_B = drops_BK[query_B, first_B]
    drops_BK[query_B, first_B] = -1.0
    second_B = drops_BK.argmax(axis=1)
    drops_BK[query_B, first_B] = first_drop_B
    low_B = np.minimum(first_B, second_B)
    high_B = np.maximum(first_B, second_B)
    exists_B = np.ones(len(drops_BK), bool)
    if variant == "released":
        for b in np.flatnonzero(high_B - low_B <= APART):
            order = np.argsort(-drops_BK[b, : num_B[b] - 1], kind="stable")
            apart = np.flatnonzero(np.abs(np.diff(order)) > APART)
            exists_B[b] = len(apart) > 0
            if exists_B[b]:
                low_B[b], high_B[b] = np.sort(order[apart[0] : apart[0] + 2])
    return low_B, high_B, exists_B
