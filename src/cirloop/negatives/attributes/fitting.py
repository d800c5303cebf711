"""Candidates by how their attributes agree with what a query wants: what the strategies on attributes share."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cirloop.negatives.attributes.table import Agreement, Table
from cirloop.negatives.base import About, Block, Mask


def fitting(strategy: str, block: Block, about: About, fits_G: Callable[[Agreement], Mask], **also_needed: str) -> Mask:
    """Which allowed candidates (B, K) `fits_G` takes, a function of how all images (G) agree with a query.

    Raises UserError where attributes, or what is `also_needed` of `about`, are not known.
    """
    about.need(
        strategy,
        attributes="attributes of the gallery's images: negatives.attributes",
        asked="attributes the texts ask for: negatives.attributes",
        **also_needed,
    )
    assert about.attributes is not None and about.asked is not None
    table, eligible_BK = Table.of(about.attributes), np.zeros_like(block.allowed_BK)
    for i, number in enumerate(block.numbers_B):
        found = table.agreement(about.asked[number], int(block.target_B[i]))
        eligible_BK[i] = block.allowed_BK[i] & fits_G(found)[block.columns_BK[i]]
    return eligible_BK
