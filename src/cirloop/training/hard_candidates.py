"""Online hard mining inside a training batch: the candidates in the loss's denominator."""

from __future__ import annotations

import torch


def hard_candidate_mask(
    scores_BN: torch.Tensor,
    target_B: torch.Tensor,
    known_positive_BN: torch.Tensor,
    top: int,
    k: int,
    margin: float | None = 0.0,
) -> torch.Tensor:
    """Mark (B, N) each query's target and the hardest `k` of its valid candidates.

    Candidates are those of the batch (or a queue) but the target `target_B` and the known positives
    `known_positive_BN`. Of the `top` most similar ones, those scored at most `margin` above the
    target, in the units of `scores_BN`, are valid (None: all). The `k` best-scored valid ones are
    kept, ties to the lower candidate. This is the rule of `negatives.online_hardest`, with
    `candidate_pool` = `top`; the loss ignores what is False.

    Degenerate cases: with `top` and `k` >= N and `margin` None, all but the known positives are
    kept, as in plain InfoNCE; a query without a valid candidate keeps its target alone and has no
    loss.
    """
    scores_BN = scores_BN.detach()
    target_B1 = target_B[:, None]
    excluded_BN = known_positive_BN.scatter(1, target_B1, True)
    order_BN = scores_BN.sort(dim=1, descending=True, stable=True).indices
    kept_BN = ~excluded_BN.gather(1, order_BN)
    kept_BN &= kept_BN.cumsum(1) <= top
    if margin is not None:
        kept_BN &= (scores_BN <= scores_BN.gather(1, target_B1) + margin).gather(1, order_BN)
    kept_BN &= kept_BN.cumsum(1) <= k
    return (
        torch.zeros_like(known_positive_BN)
        .scatter(1, order_BN, kept_BN)
        .scatter(1, target_B1, True)
    )


def candidate_rows(kept_BN: torch.Tensor, k: int) -> torch.Tensor:
    """Return the rows (B, at most k) of candidates that are True, ascending; at most `k` are.

    -1 stands where a query has fewer.
    """
    num = min(k, kept_BN.shape[1])
    rows_BK = kept_BN.int().sort(dim=1, descending=True, stable=True).indices[:, :num]
    return rows_BK.where(kept_BN.gather(1, rows_BK), -1)
