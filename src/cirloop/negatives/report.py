"""The closing table of mining: positives against negatives, and the number per query."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


def summary(
    target_ranks: Sequence[int],
    target_scores: Sequence[float],
    counts: Sequence[int],
    scores: Sequence[float],
    k: int,
    filled: int = 0,
    set_sizes: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Summarize the counts and the quartiles of similarity, of targets and of mined images.

    Per query the target's rank and score and how many images were mined; `scores` are those of all
    mined images, `filled` how many of them a fallback gave. `set_sizes` are of strategies that draw
    from a set (`band`).
    """
    mined_Q = np.array(counts, np.int64)
    ranks_Q = np.array(target_ranks, np.int64)
    first = int((ranks_Q == 1).sum())
    out = {
        "queries": len(ranks_Q),
        "target_first": first,
        "without_candidates": int(((mined_Q == 0) & (ranks_Q > 1)).sum()),
        "fewer_than_k": int(((mined_Q > 0) & (mined_Q < k)).sum()),
        "queries_mined": int((mined_Q > 0).sum()),
        "negatives": int(mined_Q.sum()),
        "filled_by_fallback": filled,
        "similarity": {
            "positive": quartiles(np.array(target_scores)),
            "negative": quartiles(np.array(scores)),
        },
    }
    return out | ({"set_size": quartiles(np.array(set_sizes))} if set_sizes is not None else {})


def quartiles(values: npt.NDArray[Any]) -> dict[str, float] | None:
    """Return mean and quartiles, rounded; None for no values."""
    if len(values) == 0:
        return None
    low, middle, high = np.percentile(values, [25, 50, 75])
    parts = {"mean": np.mean(values), "25%": low, "median": middle, "75%": high}
    return {name: round(float(value), 4) for name, value in parts.items()}
