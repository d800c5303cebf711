"""Is one iteration better than another? A paired randomisation test over queries.

Under the hypothesis that two systems are alike, the sign of each query's difference is a coin toss
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
    """How much better `b_Q` is than `a_Q`, query by query. Raises ValueError for different or no
    queries.

    p = (1 + draws at least as far from 0) / (1 + draws): never 0, the least is 1e-4. Equal systems
    give 1.
    """
    a = np.asarray(a_Q, np.float64)
    b = np.asarray(b_Q, np.float64)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"a value per query of both systems, found shapes {a.shape} and {b.shape}")
    d = b - a
    moved = d[d != 0]  # a sign turns nothing of what is 0
    random = np.random.default_rng(seed)
    seen = abs(moved.sum())
    far = 0
    for start in range(0, DRAWS, BLOCK):
        signs = random.integers(0, 2, (min(BLOCK, DRAWS - start), len(moved)), np.int8) * 2 - 1
        far += int((abs(signs @ moved) >= seen - 1e-9).sum())
    return Difference(float(d.mean()), float(d.std() / len(d) ** 0.5), (1 + far) / (1 + DRAWS))


def compared(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each evaluation against the one before it, from their JSON."""
    out = []
    for a, b in pairwise(results):
        d = paired([row[2] for row in a["ranks"]], [row[2] for row in b["ranks"]])
        names = {"from": a["iteration"], "to": b["iteration"], "metric": a["compared_on"]}
        out.append(names | {"difference": d.value, "se": d.se, "p": d.p})
    return out
