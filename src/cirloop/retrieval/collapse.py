"""Collapsed embeddings: all images have nearly the same vector, so that rankings mean nothing."""

from __future__ import annotations

import numpy as np

from cirloop.backbones.similarity import mean_pool
from cirloop.retrieval.arrays import Vectors

COLLAPSE_THRESHOLD = 0.98
"""Mean cosine of two images from which on embeddings count as collapsed."""
SAMPLED = 1000
"""Images that are compared."""


def mean_cosine(vectors_ND: Vectors, seed: int) -> float | None:
    """Return the mean cosine of two different rows, of at most SAMPLED rows drawn by `seed`; None
    for fewer than two.

    Rows (N, D) of unit norm, or (N, M, D) of images with several, of which the mean counts. The sum
    over all pairs is the squared norm of the rows' sum: no matrix of pairs.
    """
    num = min(len(vectors_ND), SAMPLED)
    if num < 2:
        return None
    rows = np.sort(np.random.default_rng(seed).permutation(len(vectors_ND))[:num])
    sample_ND = mean_pool(np.asarray(vectors_ND[rows], np.float64))
    total_D = sample_ND.sum(axis=0)
    return float((total_D @ total_D - (sample_ND**2).sum()) / (num * (num - 1)))
