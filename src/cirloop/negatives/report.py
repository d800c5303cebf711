"""The closing table of mining: positives against negatives, and what was dropped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cirloop.types import MinedNegative, Rankings


def summary(rankings: Rankings, mined: Sequence[MinedNegative]) -> dict[str, Any]:
    """Counts and the quartiles of similarity, of targets and of mined images."""
    with_any = len({negative.query for negative in mined})
    first = int((rankings.target_rank_Q == 1).sum())
    return {
        "queries": len(rankings.queries),
        "target_first": first,
        "without_candidates": len(rankings.queries) - first - with_any,
        "queries_mined": with_any,
        "negatives": len(mined),
        "similarity": {
            "positive": _quartiles(rankings.target_score_Q),
            "negative": _quartiles(np.array([negative.score for negative in mined])),
        },
    }


def _quartiles(values: Any) -> dict[str, float] | None:
    if len(values) == 0:
        return None
    low, middle, high = np.percentile(values, [25, 50, 75])
    parts = {"mean": np.mean(values), "25%": low, "median": middle, "75%": high}
    return {name: round(float(value), 4) for name, value in parts.items()}
