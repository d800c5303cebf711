"""Losses on gathered embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def info_nce(
    queries_BD: torch.Tensor,
    candidates_ND: torch.Tensor,
    target_B: torch.Tensor,
    also_right_BN: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """InfoNCE (arXiv 1807.03748, eq. 4) of unit-norm rows: each query against every candidate.

    `target_B` is the candidate row of each query's target; `also_right_BN` marks other candidates known to be right,
    which are left out of the denominator. Mean over the queries.
    """
    scores_BN = queries_BD @ candidates_ND.T / temperature
    return F.cross_entropy(scores_BN.masked_fill(also_right_BN, float("-inf")), target_B)
