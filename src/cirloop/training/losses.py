"""Losses on the scores of gathered embeddings. Each is a mean over the queries.

B queries, N candidates of the batch, K negatives of a query.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True, slots=True)
class CandidateMasks:
    """Masks and rows of a batch's candidates.

    `target_B` is the candidate row of each query's target. `ignored_BN` marks candidates that are
    no negatives: known to be right, or dropped by online mining. `hard_negatives_BK` are rows of
    each query's hard negatives, -1 where it has fewer. `hard_candidates_BH` are rows of the hardest
    valid candidates, likewise, where online mining keeps them.
    """

    target_B: torch.Tensor
    ignored_BN: torch.Tensor
    hard_negatives_BK: torch.Tensor
    hard_candidates_BH: torch.Tensor | None = None

    def hard_negative_mask_BN(self) -> torch.Tensor:
        """Mark (B, N) the candidates that are a query's hard negatives."""
        mask_BN = torch.zeros_like(self.ignored_BN)
        exists_BK = self.hard_negatives_BK >= 0
        query_BK = torch.arange(len(mask_BN), device=mask_BN.device)[:, None].expand_as(exists_BK)
        mask_BN[query_BK[exists_BK], self.hard_negatives_BK[exists_BK]] = True
        return mask_BN


Loss = Callable[[torch.Tensor, CandidateMasks], torch.Tensor]
"""Scores (B, N) and masks -> a scalar."""


def info_nce(
    scores_BN: torch.Tensor,
    masks: CandidateMasks,
    temperature: float,
    mask_margin: float | None = None,
) -> torch.Tensor:
    """Return the cross entropy of the target among a query's candidates (arXiv 1807.03748, eq. 4).

    With `mask_margin`, other queries' candidates scored more than this above the target are ignored
    as well.
    """
    ignored_BN = masks.ignored_BN
    if mask_margin is not None:
        limit_B1 = scores_BN.detach().gather(1, masks.target_B[:, None]) + mask_margin
        too_high_BN = scores_BN.detach() > limit_B1
        ignored_BN = ignored_BN | (too_high_BN & ~masks.hard_negative_mask_BN())
    logits_BN = (scores_BN / temperature).masked_fill(ignored_BN, float("-inf"))
    return F.cross_entropy(logits_BN, masks.target_B)


def triplet(scores_BN: torch.Tensor, masks: CandidateMasks, margin: float) -> torch.Tensor:
    """Return the mean of max(0, margin + negative - target) over negatives (arXiv 1503.03832).

    Negatives are the hardest valid candidates of the batch where online mining keeps them, else the
    query's hard negatives.
    """
    negatives_BK = masks.hard_candidates_BH
    if negatives_BK is None:
        negatives_BK = masks.hard_negatives_BK
    hinge_BK = F.relu(margin - _leads(scores_BN, masks.target_B, negatives_BK))
    return _pairwise_mean(hinge_BK, negatives_BK)


def bradley_terry(
    scores_BN: torch.Tensor, masks: CandidateMasks, temperature: float
) -> torch.Tensor:
    """Return the mean of -log sigmoid((target - negative) / temperature) (arXiv 2507.12416)."""
    leads_BK = _leads(scores_BN, masks.target_B, masks.hard_negatives_BK)
    return _pairwise_mean(-F.logsigmoid(leads_BK / temperature), masks.hard_negatives_BK)


def weighted(
    scores_BN: torch.Tensor, masks: CandidateMasks, parts: Sequence[tuple[float, Loss]]
) -> torch.Tensor:
    """Return a weighted sum of losses."""
    return torch.stack([weight * loss(scores_BN, masks) for weight, loss in parts]).sum()


def _leads(
    scores_BN: torch.Tensor, target_B: torch.Tensor, negatives_BK: torch.Tensor
) -> torch.Tensor:
    """Return how much higher the target scores than each negative (B, K).

    The values where a query has no negative are not used.
    """
    return scores_BN.gather(1, target_B[:, None]) - scores_BN.gather(1, negatives_BK.clamp(min=0))


def _pairwise_mean(terms_BK: torch.Tensor, negatives_BK: torch.Tensor) -> torch.Tensor:
    """Average terms over a query's negatives, and then over the queries that have any.

    Returns 0 where no query has any.
    """
    exists_BK = negatives_BK >= 0
    num_B = exists_BK.sum(1)
    means_B = terms_BK.masked_fill(~exists_BK, 0.0).sum(1) / num_B.clamp(min=1)
    return means_B.sum() / (num_B > 0).sum().clamp(min=1)
