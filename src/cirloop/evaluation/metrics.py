"""Recall and its standard error from ranks."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import numpy as np
import numpy.typing as npt

KS = (1, 5, 10, 50)


def recall_at(ranks_Q: npt.NDArray[np.int64] | Sequence[int], k: int) -> float:
    """Share of queries whose rank (from 1) is at most `k`, in percent."""
    return 100.0 * float(np.mean(np.asarray(ranks_Q) <= k))


def standard_error(recall: float, num_queries: int) -> float:
    """Binomial standard error of a recall, both in percentage points."""
    p = recall / 100.0
    return 100.0 * sqrt(p * (1.0 - p) / num_queries)


def recalls(
    ranks_Q: npt.NDArray[np.int64] | Sequence[int], ks: Sequence[int] = KS, prefix: str = "R"
) -> dict[str, dict[str, float]]:
    """`{"R@1": {"value": .., "se": ..}, ..}`, in percent, rounded to 0.001."""
    out = {}
    for k in ks:
        value = recall_at(ranks_Q, k)
        out[f"{prefix}@{k}"] = {"value": round(value, 3), "se": round(standard_error(value, len(ranks_Q)), 3)}
    return out
