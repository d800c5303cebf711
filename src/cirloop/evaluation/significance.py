"""Standard errors over queries and over runs, and a paired test of whether one system is better
than another.

Under the hypothesis that two systems are equal, the sign of each query's difference is a coin toss
(Fisher's randomisation test; Smucker, Allan & Carterette, CIKM 2007). Queries that share their
reference image are not independent: they are one cluster, tossed together. Q queries, C clusters,
R runs that differ in their seed.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]

DRAWS = 9_999
BLOCK = 500


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean difference b - a over queries, its standard error, and the two-sided p-value."""

    value: float
    se: float
    p: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """Mean over runs and its standard error, NaN where there is one run."""

    value: float
    se: float


def over_runs(values_R: npt.ArrayLike) -> Estimate:
    """Compute the mean over runs and its standard error, the sample deviation by the root of R."""
    values = np.asarray(values_R, np.float64)
    se = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
    return Estimate(float(values.mean()), float(se))


def difference_over_runs(a: Mapping[Hashable, float], b: Mapping[Hashable, float]) -> Estimate:
    """Compute the mean difference b - a of runs by their seeds, and its standard error over runs.

    Runs are paired by seed where both have the same ones, else the two means are independent.
    """
    if a.keys() == b.keys():
        return over_runs([b[seed] - a[seed] for seed in a])
    first = over_runs([*a.values()])
    second = over_runs([*b.values()])
    return Estimate(second.value - first.value, float(np.hypot(first.se, second.se)))


def cluster_sums(values_Q: Values, clusters: Sequence[Hashable]) -> Values:
    """Sum the values of each cluster, in the order in which clusters first appear."""
    sums: dict[Hashable, float] = {}
    for cluster, value in zip(clusters, values_Q.tolist(), strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + value
    return np.array([*sums.values()])


def standard_error(values_Q: Values, clusters: Sequence[Hashable]) -> float:
    """Compute the cluster-robust standard error of the mean (Liang & Zeger, Biometrika 1986).

    Where each query is a cluster of its own, this is that of independent queries. It has no factor
    for small samples: with fewer than some 30 clusters it is too small, with one it is 0.
    """
    residual_C = cluster_sums(values_Q - values_Q.mean(), clusters)
    return float((residual_C**2).sum() ** 0.5 / len(values_Q))


def paired(
    a_Q: npt.ArrayLike,
    b_Q: npt.ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> Difference:
    """Test how much better `b_Q` is than `a_Q`, query by query; `clusters` names each query's.

    p = (1 + draws at least as far from 0) / (1 + draws): never 0, the smallest is 1e-4. Equal
    systems give 1. Raises ValueError for different or no queries, and for values that are not
    finite.
    """
    a = np.asarray(a_Q, np.float64)
    b = np.asarray(b_Q, np.float64)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"a value per query of both systems, found shapes {a.shape} and {b.shape}")
    difference_Q = b - a
    if not np.isfinite(difference_Q).all():
        raise ValueError("a value per query of both systems, found some that are not finite")
    names = range(len(a)) if clusters is None else clusters
    sums_C = cluster_sums(difference_Q, names)
    nonzero = sums_C[sums_C != 0]  # a sign does not change a difference of 0
    rng = np.random.default_rng(seed)
    observed = abs(nonzero.sum())
    num_far = 0
    for start in range(0, DRAWS, BLOCK):
        signs = rng.integers(0, 2, (min(BLOCK, DRAWS - start), len(nonzero)), np.int8) * 2 - 1
        num_far += int((abs(signs @ nonzero) >= observed - 1e-9).sum())
    se = standard_error(difference_Q, names)
    return Difference(float(difference_Q.mean()), se, (1 + num_far) / (1 + DRAWS))


def error_changes(
    before: Sequence[Any], after: Sequence[Any], metric: str
) -> dict[str, int] | None:
    """Count queries by whether their first image is wrong: in both evaluations (`persistent`), in
    the later alone (`new`), in the earlier alone (`mended`).

    Rows are those of an evaluation. Right is the target, or by `metric` "any correct recall@1" any
    right image. None where people chose between sets, which have margins instead of ranks.
    """
    if not all(isinstance(row[1], int) for row in (*before, *after)):
        return None
    column, right = (2, 1.0) if metric == "any correct recall@1" else (1, 1)
    pairs = [
        (old[column] != right, new[column] != right) for old, new in zip(before, after, strict=True)
    ]
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

    Where queries have ranks, `errors` counts those whose first image is wrong. `p_corrected` is
    `p` corrected for the number of comparisons.
    """
    out = []
    for before, after in pairwise(results):
        a, b = ([row[2] for row in result["ranks"]] for result in (before, after))
        test = paired(a, b, clusters=[row[3] for row in after["ranks"]])
        out.append(
            {
                "from": before["iteration"],
                "to": after["iteration"],
                "metric": before["compared_on"],
                "difference": test.value,
                "se": test.se,
                "p": test.p,
                "errors": error_changes(before["ranks"], after["ranks"], before["compared_on"]),
            }
        )
    for row, corrected in zip(out, holm([row["p"] for row in out]), strict=True):
        row["p_corrected"] = corrected
    return out
