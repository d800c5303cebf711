"""Eligible candidates by how their attributes agree with a query, for strategies on attributes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cirloop.negatives.attributes.table import Agreement, Table
from cirloop.negatives.base import CandidateBlock, MiningContext
from cirloop.retrieval.arrays import Mask


def eligible_by_attributes(
    strategy: str,
    block: CandidateBlock,
    context: MiningContext,
    fits_G: Callable[[Agreement], Mask],
    **also_needed: str,
) -> Mask:
    """Return the eligible candidates (B, K) that `fits_G` accepts by how all images (G) agree.

    Raises UserError where attributes, or fields of the context that are `also_needed`, are unknown.
    """
    context.require(
        strategy,
        attributes="attributes of the gallery's images: negatives.attributes",
        requested_attributes="attributes the texts ask for: negatives.attributes",
        **also_needed,
    )
    assert context.attributes is not None and context.requested_attributes is not None
    table = Table.of(context.attributes)
    eligible_BK = np.zeros_like(block.eligible_BK)
    for i, query in enumerate(block.query_index_B):
        agreement = table.agreement(context.requested_attributes[query], int(block.target_B[i]))
        eligible_BK[i] = block.eligible_BK[i] & fits_G(agreement)[block.gallery_index_BK[i]]
    return eligible_BK
