"""Mined images as pairs for the filters, and as rows of the artifact."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cirloop.negatives import MiningSettings
from cirloop.negatives.filters import MinedPairs
from cirloop.negatives.miner import MiningInputs, MiningResult
from cirloop.types import MinedNegative, TrainSplit


def mined_pairs(results: Sequence[MiningResult], vectors: MiningInputs) -> MinedPairs:
    """Return the mined pairs of all queries as flat arrays, in the order of the results."""
    counts = [len(f.gallery_indices) for f in results]
    numbers_N = np.repeat(np.arange(len(results)), counts)
    scores = np.array([f.target_score for f in results], np.float32)
    return MinedPairs(
        numbers_N,
        np.concatenate([np.zeros(0, np.int64), *(f.gallery_indices for f in results)]),
        np.concatenate([np.zeros(0, np.float32), *(f.scores for f in results)]),
        vectors.targets_Q[numbers_N],
        scores[numbers_N],
    )


def mined_rows(
    train: TrainSplit,
    results: Sequence[MiningResult],
    keep_N: npt.NDArray[np.bool_],
    settings: MiningSettings,
) -> list[MinedNegative]:
    """Return the rows of the artifact for the pairs that `keep_N` marks."""
    out = []
    pair_index = 0
    for result in results:
        query = train.triplets[result.query_index].query.id
        num_own = len(result.gallery_indices) - result.num_fallback
        for position, (column, rank, score) in enumerate(
            zip(result.gallery_indices, result.ranks, result.scores, strict=True)
        ):
            if keep_N[pair_index]:
                name = settings.strategy.type
                source = name if position < num_own else f"{name}, filled by {settings.fallback}"
                out.append(
                    MinedNegative(
                        query,
                        train.gallery.ids[column],
                        int(rank),
                        round(float(score), 6),
                        result.target_rank,
                        round(result.target_score, 6),
                        source,
                    )
                )
            pair_index += 1
    return out
