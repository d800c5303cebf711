"""Collapsed embeddings: images that all have nearly the same vector, so that no ranking means
anything."""

from __future__ import annotations

from typing import Any

import numpy as np

from cirloop.backbones.similarity import mean_pool

ALIKE = 0.98
"""Mean cosine of two images from which on they count as collapsed."""
SAMPLED = 1000
"""Images looked at."""


def mean_cosine(vectors_ND: Any, seed: int) -> float | None:
    """The mean cosine of two different rows, of at most SAMPLED rows drawn by `seed`; None for
    fewer than two.

    Rows (N, D) of unit norm, or (N, M, D) of images with several, of which the mean counts. The sum
    over all pairs is the squared norm of the rows' sum: no matrix of pairs.
    """
    num = min(len(vectors_ND), SAMPLED)
    if num < 2:
        return None
    rows = np.sort(np.random.default_rng(seed).permutation(len(vectors_ND))[:num])
    drawn_ND = mean_pool(np.asarray(vectors_ND[rows], np.float64))
    total_D = drawn_ND.sum(axis=0)
    return float((total_D @ total_D - (drawn_ND**2).sum()) / (num * (num - 1)))
