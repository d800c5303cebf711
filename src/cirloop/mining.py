"""A strategy over all queries, block by block: vectors in, chosen images with their ranks and scores out.

Strategies that see the whole gallery get blocks of all scores; the others get each query's best images, found without
ever holding more than a block (`retrieval/top.py`). Array suffixes as in `negatives/base.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cirloop import memory, stopping
from cirloop.negatives.base import About, Block, Floats, Rows, Strategy, best_of, ranked
from cirloop.retrieval.blocks import score_blocks
from cirloop.retrieval.index import indexed_rows
from cirloop.retrieval.top import best_rows, pair_scores, places
from cirloop.types import UserError

SMALLER = (
    "Set mining.search ivf_pq, which holds the least (docs/scaling.md), a smaller depth of the strategy, or "
    'CUDA_VISIBLE_DEVICES="" to search in the machine\'s memory.'
)


@dataclass(frozen=True, slots=True)
class Vectors:
    """What is mined: queries against a gallery, float16 or float32, memory-mapped or not.

    `targets_Q` are gallery rows, `references_Q` too (-1: the reference is not in the gallery; None: there are none),
    `positives` per query further right answers.
    """

    queries_QD: Any
    gallery_GD: Any
    targets_Q: Rows
    references_Q: Rows | None = None
    positives: Sequence[frozenset[int]] | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """What was mined for one query: gallery rows, best first, with their ranks and scores.

    The last `filled` come from the fallback. `whole` is the set they were drawn from, where the strategy has one.
    """

    number: int
    target_rank: int
    target_score: float
    columns: Rows
    ranks: Rows
    scores: Floats
    filled: int = 0
    whole: Rows | None = None


def mine(
    strategy: Strategy,
    vectors: Vectors,
    about: About,
    device: str = "cpu",
    sets: bool = False,
    target_ranks: bool = True,
    notes: dict[str, Any] | None = None,
) -> Iterator[Found]:
    """What `strategy` chooses for each query, in the queries' order; no images where it passes a query over.

    Ranks count from 1 among all images, the reference left out unless `strategy.reference` is "in". Without
    `target_ranks`, a target that is not among the best images has rank 0: counting its place costs more than mining.
    `notes` gets what a report should say: the recall of an approximate search, counts of the strategy. Raises UserError
    where a strategy sees the whole gallery and another search than "exact" is asked for.
    """
    if strategy.search != "exact" and (strategy.whole or strategy.fallback == "random"):
        raise UserError(f"search: {strategy.search} is for strategies that need the best images only, without a random "
                        f"fallback; {strategy.type} sees the whole gallery.")  # fmt: skip
    notes = {} if notes is None else notes
    with memory.enough(f"mining {len(vectors.gallery_GD)} images", SMALLER):
        scores_Q = pair_scores(vectors.queries_QD, vectors.gallery_GD, vectors.targets_Q, device)
    about = replace(
        about, targets_Q=vectors.targets_Q, mean_target_score=float(scores_Q.mean()) if len(scores_Q) else 0
    )
    if not strategy.whole and strategy.fallback != "random":
        blocks = _windows(strategy, vectors, device, target_ranks or strategy.only_wrong, notes)
    elif strategy.whole:
        blocks = _whole(strategy, vectors, device)
    else:  # the best ones to choose from, all of them to draw from
        blocks = (ranked(block)[0] for block in _whole(strategy, vectors, device))
    with memory.enough(f"mining {len(vectors.gallery_GD)} images", SMALLER):
        for block in blocks:
            stopping.check()
            yield from _chosen(strategy, block, about, sets, notes)


def _chosen(strategy: Strategy, block: Block, about: About, sets: bool, notes: dict[str, Any]) -> Iterator[Found]:
    mined_B = block.target_rank_B > 1 if strategy.only_wrong else np.ones(len(block.numbers_B), bool)
    part = block if mined_B.all() else block.of(np.flatnonzero(mined_B))
    wholes = strategy.sets(part, about) if sets else None
    chosen = strategy.choose(part, about) if wholes is None else strategy.from_sets(part, about, wholes)
    for name, count in (strategy.counts(part, about, wholes) if wholes is not None else {}).items():
        notes[name] = notes.get(name, 0) + count
    found, sets_of = iter(chosen), iter(wholes or [])
    for b, mined in enumerate(mined_B):
        picks, filled = next(found) if mined else np.zeros(0, np.int64), 0
        if mined and len(picks) < strategy.k and strategy.fallback != "none":
            more = _fill(strategy, block, b, picks, about)
            picks, filled = np.concatenate([picks, more]), len(more)
        inside = next(sets_of, None) if mined else None
        whole = inside if inside is None or block.ranks_BK is None else block.columns_BK[b, inside]
        yield Found(
            int(block.numbers_B[b]), int(block.target_rank_B[b]), float(block.target_score_B[b]),
            block.columns_BK[b, picks], _ranks(block, b, picks), block.scores_BK[b, picks], filled, whole,
        )  # fmt: skip


def _fill(strategy: Strategy, block: Block, b: int, picks: Rows, about: About) -> Rows:
    left = np.setdiff1d(np.flatnonzero(block.allowed_BK[b]), picks)
    num = min(strategy.k - len(picks), len(left))
    if strategy.fallback == "random":
        left = about.stream(int(block.numbers_B[b])).choice(left, num, replace=False)
    return best_of(block.scores_BK[b], np.sort(left), num)


def _ranks(block: Block, b: int, picks: Rows) -> Rows:
    if block.ranks_BK is not None:
        return np.asarray(block.ranks_BK[b, picks])
    scores = block.scores_BK[b]
    num = np.count_nonzero
    return np.array([num(scores > scores[p]) + num(scores[:p] == scores[p]) + 1 for p in picks], np.int64)


def _whole(strategy: Strategy, vectors: Vectors, device: str) -> Iterator[Block]:
    numbers = np.arange(len(vectors.targets_Q))
    columns_G = np.arange(len(vectors.gallery_GD))
    for rows, scores_BG in score_blocks(vectors.queries_QD, vectors.gallery_GD, numbers, device):
        here, allowed_BG = np.arange(len(rows)), np.ones(scores_BG.shape, bool)
        target_B = vectors.targets_Q[rows]
        if vectors.references_Q is not None and strategy.reference == "out":
            known = np.flatnonzero(vectors.references_Q[rows] >= 0)
            scores_BG[known, vectors.references_Q[rows[known]]] = -np.inf
            allowed_BG[known, vectors.references_Q[rows[known]]] = False
        allowed_BG[here, target_B] = False
        for b, right in enumerate(vectors.positives[rows[0] : rows[-1] + 1] if vectors.positives else ()):
            allowed_BG[b, list(right)] = False
        score_B = scores_BG[here, target_B]
        rank_B = np.count_nonzero(scores_BG > score_B[:, None], axis=1) + 1
        num_tied_B = np.count_nonzero(scores_BG == score_B[:, None], axis=1)
        for tied in np.flatnonzero(num_tied_B > 1):
            rank_B[tied] += np.count_nonzero(scores_BG[tied, : target_B[tied]] == score_B[tied])
        yield Block(rows, np.broadcast_to(columns_G, scores_BG.shape), scores_BG, allowed_BG, target_B, score_B, rank_B)


def _windows(
    strategy: Strategy, vectors: Vectors, device: str, target_ranks: bool, notes: dict[str, Any]
) -> Iterator[Block]:
    num = len(vectors.targets_Q)
    more = 2 + max(map(len, vectors.positives or [frozenset()]), default=0)  # target, reference and positives
    more += strategy.k if strategy.fallback == "top_k" else 0
    depth = strategy.depth + more
    if strategy.search == "exact":
        columns_QK, scores_QK = best_rows(vectors.queries_QD, vectors.gallery_GD, depth, device)
    else:
        columns_QK, scores_QK, found = indexed_rows(
            vectors.queries_QD, vectors.gallery_GD, depth, strategy.search, strategy.index
        )
        notes["search_recall"] = round(found, 4)
    allowed_QK = (columns_QK != vectors.targets_Q[:, None]) & (columns_QK >= 0)
    rank_Q, score_Q = _target_places(vectors, columns_QK, scores_QK, device, target_ranks)
    ranks_QK = np.broadcast_to(np.arange(1, columns_QK.shape[1] + 1), columns_QK.shape)
    if vectors.references_Q is not None and strategy.reference == "out":
        at_QK = columns_QK == vectors.references_Q[:, None]
        allowed_QK &= ~at_QK
        ranks_QK = ranks_QK - (at_QK.cumsum(axis=1) - at_QK)
        rank_Q = rank_Q - np.where(rank_Q > 0, _reference_above(vectors, score_Q), 0)
    for number, right in enumerate(vectors.positives or ()):
        if right:
            allowed_QK[number] &= ~np.isin(columns_QK[number], list(right))
    for start in range(0, num, 4096):
        rows = np.arange(start, min(start + 4096, num))
        yield Block(
            rows, columns_QK[rows], scores_QK[rows], allowed_QK[rows], vectors.targets_Q[rows], score_Q[rows],
            rank_Q[rows], ranks_QK[rows],
        )  # fmt: skip


def _target_places(
    vectors: Vectors, columns_QK: Rows, scores_QK: Floats, device: str, count: bool
) -> tuple[Rows, Floats]:
    """The target's rank among all images, the reference too, and its score: from the window where it is there."""
    seen_QK = columns_QK == vectors.targets_Q[:, None]
    rank_Q, score_Q = seen_QK.argmax(axis=1) + 1, scores_QK[np.arange(len(scores_QK)), seen_QK.argmax(axis=1)]
    unseen = np.flatnonzero(~seen_QK.any(axis=1))
    if len(unseen):
        given = vectors.queries_QD[unseen], vectors.gallery_GD, vectors.targets_Q[unseen], device
        rank_Q[unseen], score_Q[unseen] = places(*given) if count else (0, pair_scores(*given))
    return rank_Q, score_Q


def _reference_above(vectors: Vectors, score_Q: Floats) -> Rows:
    """1 where the reference stands before the target, else 0."""
    assert vectors.references_Q is not None
    known = np.flatnonzero(vectors.references_Q >= 0)
    above_Q = np.zeros(len(score_Q), np.int64)
    score = pair_scores(vectors.queries_QD, vectors.gallery_GD, np.maximum(vectors.references_Q, 0))
    tied = (score == score_Q) & (vectors.references_Q < vectors.targets_Q)
    above_Q[known] = ((score > score_Q) | tied)[known]
    return above_Q
