"""Candidates by how their attributes agree with what a query wants: what the strategies on
attributes share."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cirloop.negatives.attributes.table import Agreement, Table
from cirloop.negatives.base import CandidateBlock, Mask, MiningContext


def eligible_by_attributes(
    strategy: str,
    block: CandidateBlock,
    context: MiningContext,
    fits_G: Callable[[Agreement], Mask],
    **also_needed: str,
) -> Mask:
    """Which allowed candidates (B, K) `fits_G` takes, a function of how all images (G) agree with a
    query.

    Raises UserError where attributes, or what is `also_needed` of `about`, are not known.
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
    for i, number in enumerate(block.query_index_B):
        found = table.agreement(context.requested_attributes[number], int(block.target_B[i]))
        eligible_BK[i] = block.eligible_BK[i] & fits_G(found)[block.gallery_index_BK[i]]
    return eligible_BK
