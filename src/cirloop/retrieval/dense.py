"""All scores of some queries in memory, and their order: best first, ties by column.

B queries, G images, W wanted ones, D dimensions. Needs no torch, so that settings can be read
without it.
"""

from __future__ import annotations

import numpy as np

from cirloop.retrieval.arrays import Floats, Rows, Vectors

CONVERTED_ROWS = 1 << 14
"""Gallery rows that are converted at once."""


def all_scores(queries_BD: Vectors, gallery_GD: Vectors) -> Floats:
    """Compute float32 dot products (B, G), converting the gallery part by part."""
    converted_BD = np.asarray(queries_BD, np.float32)
    scores_BG = np.empty((len(queries_BD), len(gallery_GD)), np.float32)
    for start in range(0, len(gallery_GD), CONVERTED_ROWS):
        columns = slice(start, start + CONVERTED_ROWS)
        scores_BG[:, columns] = converted_BD @ np.asarray(gallery_GD[columns], np.float32).T
    return scores_BG


def best_positions(scores_G: Floats, k: int | None = None) -> Rows:
    """Return the positions of the `k` largest scores, by default of all, best first, ties by
    position."""
    if k is not None and 0 < k < len(scores_G) // 8:
        # sorting only what is at least as good as the k-th
        near = np.flatnonzero(scores_G >= np.partition(scores_G, -k)[-k])
        return np.asarray(near[best_positions(scores_G[near])[:k]])
    # many times quicker than a stable sort, and the same where nothing is tied
    order = np.argsort(-scores_G)
    sorted_G = scores_G[order]
    if (sorted_G[1:] == sorted_G[:-1]).any():
        order = np.argsort(-scores_G, kind="stable")
    return order[:k]


def ranks_of(scores_BG: Floats, wanted_BW: Rows) -> Rows:
    """Return the rank (B, W), from 1, of each query's wanted columns among all."""
    ranks_BW = np.empty(wanted_BW.shape, np.int64)
    for scores_G, wanted_W, ranks_W in zip(scores_BG, wanted_BW, ranks_BW, strict=True):
        for w, column in enumerate(wanted_W):
            score = scores_G[column]
            tied_before = np.count_nonzero(scores_G[:column] == score)
            ranks_W[w] = np.count_nonzero(scores_G > score) + tied_before + 1
    return ranks_BW
