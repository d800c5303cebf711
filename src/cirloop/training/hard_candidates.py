"""Online hard mining inside a training batch: which candidates stay in the loss's denominator."""

from __future__ import annotations

import torch


def online_mask(
    scores_BN: torch.Tensor,
    target_B: torch.Tensor,
    also_right_BN: torch.Tensor,
    top: int,
    k: int,
    margin: float | None = 0.0,
) -> torch.Tensor:
    """(B, N) bool: True for each query's target and the hardest `k` of its valid candidates, False
    for all others.

    A query's candidates are those of the batch (or a queue) but its target `target_B` and the known
    positives `also_right_BN`. Of the `top` most similar ones, those scored at most `margin` above
    the target, in the units of `scores_BN`, are valid (None: all), and the `k` best-scored valid
    ones are kept, ties to the lower candidate. The rule of `negatives.online_hardest`, with `pool`
    = `top`; the loss leaves out what is False.

    Degenerate cases: with `top` and `k` >= N and `margin` None all but the known positives are
    kept, as in plain InfoNCE; a query without a valid candidate keeps its target alone and has no
    loss.
    """
    scores_BN = scores_BN.detach()
    target_B1 = target_B[:, None]
    barred_BN = also_right_BN.scatter(1, target_B1, True)
    order_BN = scores_BN.sort(dim=1, descending=True, stable=True).indices
    kept_BN = ~barred_BN.gather(1, order_BN)
    kept_BN &= kept_BN.cumsum(1) <= top
    if margin is not None:
        kept_BN &= (scores_BN <= scores_BN.gather(1, target_B1) + margin).gather(1, order_BN)
    kept_BN &= kept_BN.cumsum(1) <= k
    return torch.zeros_like(also_right_BN).scatter(1, order_BN, kept_BN).scatter(1, target_B1, True)


def rows_of(kept_BN: torch.Tensor, k: int) -> torch.Tensor:
    """(B, at most k) candidate rows of what is True, ascending, -1 where a query has fewer; at most
    `k` are True."""
    num = min(k, kept_BN.shape[1])
    rows_BK = kept_BN.int().sort(dim=1, descending=True, stable=True).indices[:, :num]
    return rows_BK.where(kept_BN.gather(1, rows_BK), -1)
