"""Losses on the scores of gathered embeddings. Each is a mean over the queries.

B queries, N candidates of the batch, K negatives of a query.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True, slots=True)
class Marks:
    """What is known of a batch's candidates.

    `target_B` is the candidate row of each query's target; `left_out_BN` marks candidates that are
    no negatives: known to be right, or passed over by online mining. `negatives_BK` are rows of
    each query's own negatives, -1 where it has fewer. `hardest_BH` are rows of the hardest valid
    candidates, likewise, where online mining keeps them.
    """

    target_B: torch.Tensor
    left_out_BN: torch.Tensor
    negatives_BK: torch.Tensor
    hardest_BH: torch.Tensor | None = None

    def own_BN(self) -> torch.Tensor:
        """(B, N) bool: which candidates are a query's own negatives."""
        own = torch.zeros_like(self.left_out_BN)
        there = self.negatives_BK >= 0
        query = torch.arange(len(own), device=own.device)[:, None].expand_as(there)
        own[query[there], self.negatives_BK[there]] = True
        return own


Loss = Callable[[torch.Tensor, Marks], torch.Tensor]
"""Scores (B, N) and marks to a scalar."""


def info_nce(
    scores_BN: torch.Tensor, marks: Marks, temperature: float, mask_margin: float | None = None
) -> torch.Tensor:
    """Cross entropy of the target among a query's candidates (arXiv 1807.03748, eq. 4).

    With `mask_margin`, other queries' candidates scored more than this above the target are left
    out as well.
    """
    out_BN = marks.left_out_BN
    if mask_margin is not None:
        limit_B1 = scores_BN.detach().gather(1, marks.target_B[:, None]) + mask_margin
        out_BN = out_BN | ((scores_BN.detach() > limit_B1) & ~marks.own_BN())
    return F.cross_entropy(
        (scores_BN / temperature).masked_fill(out_BN, float("-inf")), marks.target_B
    )


def triplet(scores_BN: torch.Tensor, marks: Marks, margin: float) -> torch.Tensor:
    """max(0, margin + negative - target), the mean over a query's negatives (arXiv 1503.03832): the
    hardest valid candidates of the batch where online mining keeps them, else the query's own."""
    negatives_BK = marks.negatives_BK if marks.hardest_BH is None else marks.hardest_BH
    return _pairwise(F.relu(margin - _leads(scores_BN, marks.target_B, negatives_BK)), negatives_BK)


def bradley_terry(scores_BN: torch.Tensor, marks: Marks, temperature: float) -> torch.Tensor:
    """-log sigmoid((target - negative) / temperature), the mean over a query's own negatives (arXiv
    2507.12416)."""
    leads_BK = _leads(scores_BN, marks.target_B, marks.negatives_BK)
    return _pairwise(-F.logsigmoid(leads_BK / temperature), marks.negatives_BK)


def weighted(
    scores_BN: torch.Tensor, marks: Marks, parts: Sequence[tuple[float, Loss]]
) -> torch.Tensor:
    """A weighted sum of losses."""
    return torch.stack([weight * loss(scores_BN, marks) for weight, loss in parts]).sum()


def _leads(
    scores_BN: torch.Tensor, target_B: torch.Tensor, negatives_BK: torch.Tensor
) -> torch.Tensor:
    """How much higher the target scores than each negative (B, K); what stands where there is none
    is not used."""
    return scores_BN.gather(1, target_B[:, None]) - scores_BN.gather(1, negatives_BK.clamp(min=0))


def _pairwise(terms_BK: torch.Tensor, negatives_BK: torch.Tensor) -> torch.Tensor:
    """Mean, over the queries that have negatives, of the mean over a query's negatives; 0 where no
    query has any."""
    there_BK = negatives_BK >= 0
    num_B = there_BK.sum(1)
    means_B = terms_BK.masked_fill(~there_BK, 0.0).sum(1) / num_B.clamp(min=1)
    return means_B.sum() / (num_B > 0).sum().clamp(min=1)
