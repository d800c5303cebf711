"""Paired randomisation test over queries: whether one iteration is better than another.

Under the hypothesis that two systems are equal, the sign of each query's difference is a coin toss
(Fisher's randomisation test; Smucker, Allan & Carterette, CIKM 2007). Q queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

DRAWS = 9_999
BLOCK = 500


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean difference b - a over queries, its standard error, and the two-sided p-value."""

    value: float
    se: float
    p: float


def paired(a_Q: npt.ArrayLike, b_Q: npt.ArrayLike, seed: int = 0) -> Difference:
    """Test how much better `b_Q` is than `a_Q`, query by query. Raises ValueError for different or
    no queries.

    p = (1 + draws at least as far from 0) / (1 + draws): never 0, the smallest is 1e-4. Equal
    systems give 1.
    """
    a = np.asarray(a_Q, np.float64)
    b = np.asarray(b_Q, np.float64)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"a value per query of both systems, found shapes {a.shape} and {b.shape}")
    difference_Q = b - a
    nonzero = difference_Q[difference_Q != 0]  # a sign does not change a difference of 0
    rng = np.random.default_rng(seed)
    observed = abs(nonzero.sum())
    num_far = 0
    for start in range(0, DRAWS, BLOCK):
        signs = rng.integers(0, 2, (min(BLOCK, DRAWS - start), len(nonzero)), np.int8) * 2 - 1
        num_far += int((abs(signs @ nonzero) >= observed - 1e-9).sum())
    se = float(difference_Q.std() / len(difference_Q) ** 0.5)
    return Difference(float(difference_Q.mean()), se, (1 + num_far) / (1 + DRAWS))


def error_changes(before: Sequence[Any], after: Sequence[Any]) -> dict[str, int] | None:
    """Count queries by whether their target is not first: in both evaluations (`persistent`), in
    the later alone (`new`), in the earlier alone (`mended`).

    Rows are those of an evaluation, a query's id, its target's rank and a value. None where people
    chose between sets, which have margins instead of ranks.
    """
    if not all(isinstance(row[1], int) for row in (*before, *after)):
        return None
    pairs = [(old[1] > 1, new[1] > 1) for old, new in zip(before, after, strict=True)]
    return {
        "persistent": pairs.count((True, True)),
        "new": pairs.count((False, True)),
        "mended": pairs.count((True, False)),
    }


def holm(p_C: Sequence[float]) -> list[float]:
    """Correct p-values for the number of comparisons, so that the chance of any false one is bound
    (Holm, Scandinavian Journal of Statistics 1979)."""
    corrected = [0.0] * len(p_C)
    largest = 0.0
    for rank, i in enumerate(sorted(range(len(p_C)), key=p_C.__getitem__)):
        largest = max(largest, min(1.0, (len(p_C) - rank) * p_C[i]))
        corrected[i] = largest
    return corrected


def compare_iterations(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare each evaluation with the one before it, from their JSON.

    Where queries have a target, `errors` counts those whose target is not first. `p_corrected` is
    `p` corrected for the number of comparisons.
    """
    out = []
    for before, after in pairwise(results):
        test = paired([row[2] for row in before["ranks"]], [row[2] for row in after["ranks"]])
        out.append(
            {
                "from": before["iteration"],
                "to": after["iteration"],
                "metric": before["compared_on"],
                "difference": test.value,
                "se": test.se,
                "p": test.p,
                "errors": error_changes(before["ranks"], after["ranks"]),
            }
        )
    for row, corrected in zip(out, holm([row["p"] for row in out]), strict=True):
        row["p_corrected"] = corrected
    return out
