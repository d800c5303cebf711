"""Mining over all queries, block by block: from vectors to chosen images with ranks and scores.

Strategies that see the whole gallery get blocks of all scores; the others get each query's best
images, searched without holding more than a block in memory (`retrieval/topk.py`). Array suffixes
as in `negatives/base.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cirloop.monitoring import oom, preemption
from cirloop.negatives import MiningSettings
from cirloop.negatives.base import CandidateBlock, MiningContext, sorted_block, top_of
from cirloop.retrieval.ann import ann_topk
from cirloop.retrieval.arrays import Floats, Rows, Vectors
from cirloop.retrieval.dense import ranks_of
from cirloop.retrieval.topk import ranks, score_blocks, scores_of, topk

BLOCK = 4096
"""Queries of a block of best images."""
OOM_REMEDY = (
    "Set mining.search ivf_pq, which holds the least (docs/scaling.md), a smaller depth of the"
    ' strategy, or CUDA_VISIBLE_DEVICES="" to search in the machine\'s memory.'
)


@dataclass(frozen=True, slots=True)
class MiningInputs:
    """Vectors of queries and of the mined gallery: float16 or float32, memory-mapped or not.

    `targets_Q` are gallery rows, `references_Q` too (-1: the reference is not in the gallery; None:
    there are none), `positives` per query further right answers.
    """

    queries_QD: Vectors
    gallery_GD: Vectors
    targets_Q: Rows
    references_Q: Rows | None = None
    positives: Sequence[frozenset[int]] | None = None


@dataclass(frozen=True, slots=True)
class MiningResult:
    """Mined images of one query: gallery rows, best first, with their ranks and scores.

    The last `num_fallback` come from the fallback. `candidate_set` is the set they were drawn from,
    where the strategy has one.
    """

    query_index: int
    target_rank: int
    target_score: float
    gallery_indices: Rows
    ranks: Rows
    scores: Floats
    num_fallback: int = 0
    candidate_set: Rows | None = None


def mine(
    settings: MiningSettings,
    inputs: MiningInputs,
    context: MiningContext,
    device: str = "cpu",
    sets: bool = False,
    target_ranks: bool = True,
    stats: dict[str, Any] | None = None,
) -> Iterator[MiningResult]:
    """Yield what the strategy chooses for each query, in order; no images for a skipped query.

    Ranks count from 1 among all images, the reference left out unless `settings.rank_reference`.
    Without `target_ranks`, a target that is not among the best images has rank 0: counting its rank
    costs more than mining. `stats` gets what a report should say: the recall of an approximate
    search, counts of the strategy.
    """
    strategy = settings.strategy
    stats = {} if stats is None else stats
    with oom.explain_oom(f"mining {len(inputs.gallery_GD)} images", OOM_REMEDY):
        scores_Q = scores_of(
            inputs.queries_QD, inputs.gallery_GD, inputs.targets_Q[:, None], device
        )
    mean = float(scores_Q.mean()) if len(scores_Q) else 0.0
    context = replace(
        context,
        targets_Q=inputs.targets_Q,
        references_Q=inputs.references_Q,
        mean_target_score=mean,
    )
    if not strategy.needs_full_gallery and settings.fallback != "random":
        blocks = _top_k_blocks(
            settings, inputs, device, target_ranks or settings.skips_solved_queries, stats
        )
    elif strategy.needs_full_gallery:
        blocks = _full_blocks(settings, inputs, device)
    else:  # the strategy chooses among the best, the fallback draws from all
        blocks = (sorted_block(block)[0] for block in _full_blocks(settings, inputs, device))
    with oom.explain_oom(f"mining {len(inputs.gallery_GD)} images", OOM_REMEDY):
        for block in blocks:
            preemption.raise_if_requested()
            yield from _results(settings, block, context, sets, stats)


def _results(
    settings: MiningSettings,
    block: CandidateBlock,
    context: MiningContext,
    sets: bool,
    stats: dict[str, Any],
) -> Iterator[MiningResult]:
    strategy = settings.strategy
    mined_B = np.ones(len(block.query_index_B), bool)
    if settings.skips_solved_queries:
        mined_B = block.target_rank_B > 1
    part = block if mined_B.all() else block.select(np.flatnonzero(mined_B))
    candidate_sets = strategy.candidate_sets(part, context) if sets else None
    if candidate_sets is None:
        chosen = strategy.choose(part, context)
    else:
        chosen = strategy.choose_from(part, context, candidate_sets)
        for name, count in strategy.set_stats(part, context, candidate_sets).items():
            stats[name] = stats.get(name, 0) + count
    row_of_B = np.cumsum(mined_B) - 1
    for b, mined in enumerate(mined_B):
        picks = np.zeros(0, np.int64)
        num_fallback = 0
        candidates = None
        if mined:
            picks = chosen[row_of_B[b]]
            filler = _filler(settings, block, b, picks, context)
            picks = np.concatenate([picks, filler])
            num_fallback = len(filler)
            candidates = (
                None
                if candidate_sets is None
                else block.gallery_index_BK[b, candidate_sets[row_of_B[b]]]
            )
        yield MiningResult(
            int(block.query_index_B[b]),
            int(block.target_rank_B[b]),
            float(block.target_score_B[b]),
            block.gallery_index_BK[b, picks],
            _ranks(block, b, picks),
            block.scores_BK[b, picks],
            num_fallback,
            candidates,
        )


def _filler(
    settings: MiningSettings, block: CandidateBlock, b: int, picks: Rows, context: MiningContext
) -> Rows:
    """Return the candidates that the fallback adds to the picks of a query."""
    num_missing = settings.strategy.negatives_per_query - len(picks)
    if settings.fallback == "none" or num_missing <= 0:
        return picks[:0]
    candidates = np.setdiff1d(np.flatnonzero(block.eligible_BK[b]), picks)
    if settings.fallback == "random":
        num = min(num_missing, len(candidates))
        rng = context.rng(int(block.query_index_B[b]))
        candidates = np.sort(rng.choice(candidates, num, replace=False))
    return top_of(block.scores_BK[b], candidates, num_missing)


def _ranks(block: CandidateBlock, b: int, picks: Rows) -> Rows:
    if block.ranks_BK is not None:
        return np.asarray(block.ranks_BK[b, picks])
    return np.asarray(ranks_of(block.scores_BK[b : b + 1], picks[None])[0])


def _full_blocks(
    settings: MiningSettings, inputs: MiningInputs, device: str
) -> Iterator[CandidateBlock]:
    """Yield all scores of some queries at a time, -inf for a reference that is not ranked."""
    index_Q = np.arange(len(inputs.targets_Q))
    index_G = np.arange(len(inputs.gallery_GD))
    for block, scores_BG in score_blocks(inputs.queries_QD, inputs.gallery_GD, device):
        eligible_BG = np.ones(scores_BG.shape, bool)
        target_B = inputs.targets_Q[block]
        query_B = np.arange(len(scores_BG))
        if inputs.references_Q is not None and not settings.rank_reference:
            reference_B = inputs.references_Q[block]
            ranked = np.flatnonzero(reference_B >= 0)
            scores_BG[ranked, reference_B[ranked]] = -np.inf
            eligible_BG[ranked, reference_B[ranked]] = False
        eligible_BG[query_B, target_B] = False
        for b, right in enumerate(inputs.positives[block] if inputs.positives else ()):
            eligible_BG[b, list(right)] = False
        rows_BG = np.broadcast_to(index_G, scores_BG.shape)
        rank_B = ranks_of(scores_BG, target_B[:, None])[:, 0]
        yield CandidateBlock(
            index_Q[block],
            rows_BG,
            scores_BG,
            eligible_BG,
            target_B,
            scores_BG[query_B, target_B],
            rank_B,
        )


def _top_k_blocks(
    settings: MiningSettings,
    inputs: MiningInputs,
    device: str,
    target_ranks: bool,
    stats: dict[str, Any],
) -> Iterator[CandidateBlock]:
    """Yield the best images of each query, enough that those the strategy needs are eligible."""
    max_positives = max(map(len, inputs.positives or [frozenset()]), default=0)
    depth = settings.strategy.depth + 1 + max_positives  # 1 for the target
    depth += settings.strategy.negatives_per_query if settings.fallback == "top_k" else 0
    excluded = None
    if inputs.references_Q is not None and not settings.rank_reference:
        excluded = inputs.references_Q[:, None]
    rows_QK, scores_QK = _search(settings, inputs, depth, excluded, device, stats)
    eligible_QK = (rows_QK != inputs.targets_Q[:, None]) & (rows_QK >= 0)
    for query, right in enumerate(inputs.positives or ()):
        if right:
            eligible_QK[query] &= ~np.isin(rows_QK[query], list(right))
    rank_Q, score_Q = _target_ranks(inputs, rows_QK, scores_QK, device, excluded, target_ranks)
    ranks_QK = np.broadcast_to(np.arange(1, rows_QK.shape[1] + 1), rows_QK.shape)
    index_Q = np.arange(len(rows_QK))
    for start in range(0, len(rows_QK), BLOCK):
        block = slice(start, start + BLOCK)
        yield CandidateBlock(
            index_Q[block],
            rows_QK[block],
            scores_QK[block],
            eligible_QK[block],
            inputs.targets_Q[block],
            score_Q[block],
            rank_Q[block],
            ranks_QK[block],
        )


def _search(
    settings: MiningSettings,
    inputs: MiningInputs,
    depth: int,
    excluded: Rows | None,
    device: str,
    stats: dict[str, Any],
) -> tuple[Rows, Floats]:
    """Search the best images exactly or by an index, whose recall is added to `stats`."""
    queries_QD = inputs.queries_QD
    gallery_GD = inputs.gallery_GD
    if settings.search == "exact":
        return topk(queries_QD, gallery_GD, depth, device, excluded)
    rows_QK, scores_QK, recall = ann_topk(
        queries_QD, gallery_GD, depth, settings.search, settings.index, excluded_QE=excluded
    )
    stats["search_recall"] = round(recall, 4)
    return rows_QK, scores_QK


def _target_ranks(
    inputs: MiningInputs,
    rows_QK: Rows,
    scores_QK: Floats,
    device: str,
    excluded: Rows | None,
    target_ranks: bool,
) -> tuple[Rows, Floats]:
    """Return the target's rank and score: from the best images where it is one of them, else
    counted, or rank 0 without `target_ranks`."""
    is_target_QK = rows_QK == inputs.targets_Q[:, None]
    position_Q = is_target_QK.argmax(axis=1)
    rank_Q = position_Q + 1
    score_Q = scores_QK[np.arange(len(scores_QK)), position_Q]
    rest = np.flatnonzero(~is_target_QK.any(axis=1))
    if not len(rest):
        return rank_Q, score_Q
    queries_QD = inputs.queries_QD[rest]
    targets_Q1 = inputs.targets_Q[rest, None]
    if target_ranks:
        excluded_rest = None if excluded is None else excluded[rest]
        ranks_Q1, scores_Q1 = ranks(
            queries_QD, inputs.gallery_GD, targets_Q1, device, excluded_rest
        )
        rank_Q[rest] = ranks_Q1[:, 0]
    else:
        scores_Q1 = scores_of(queries_QD, inputs.gallery_GD, targets_Q1, device)
        rank_Q[rest] = 0
    score_Q[rest] = scores_Q1[:, 0]
    return rank_Q, score_Q
