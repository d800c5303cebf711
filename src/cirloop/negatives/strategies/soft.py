"""Soft negatives: images that agree with what is wanted in some attributes and differ in others.

Wanted are the values the text asks for and, in other attributes, the target's own
(`attributes.values.compare_values`). With a attributes that are known to agree and d that are known
to differ, an image's share is a / (a + d); it is a candidate where 0 < share < 1 and
`min_agreement` <= share <= `max_agreement`, the best-scored first. An unknown attribute counts on
neither side. Degenerate cases: with fewer than two known attributes no image agrees on some, and
nothing is given.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from cirloop.negatives.attributes.eligible import eligible_by_attributes
from cirloop.negatives.attributes.table import Agreement
from cirloop.negatives.base import CandidateBlock, MiningContext, Strategy, top_eligible
from cirloop.retrieval.arrays import Mask, Rows


class Soft(Strategy):
    """The `negatives_per_query` best-scored images that agree on some known attributes, not on all
    and not on none."""

    context_fields: ClassVar[tuple[str, ...]] = ("attributes",)
    type: Literal["soft"] = "soft"
    min_agreement: float = Field(0.0, ge=0, le=1)
    """Least share of the known attributes that agree; 0 = at least one attribute."""
    max_agreement: float = Field(1.0, ge=0, le=1)
    """Greatest share of the known attributes that agree; 1 = all but one."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_agreement > self.max_agreement:
            raise ValueError(
                f"min_agreement {self.min_agreement} is above max_agreement {self.max_agreement}"
            )
        return self

    def choose(self, block: CandidateBlock, context: MiningContext) -> list[Rows]:
        def fits_G(agreement: Agreement) -> Mask:
            agree_G = agreement.requested_agree_G + agreement.other_agree_G
            differ_G = agreement.requested_differ_G + agreement.other_differ_G
            share_G = agree_G / np.maximum(agree_G + differ_G, 1)
            return np.asarray(
                (agree_G > 0)
                & (differ_G > 0)
                & (share_G >= self.min_agreement)
                & (share_G <= self.max_agreement)
            )

        return top_eligible(
            block,
            eligible_by_attributes(self.type, block, context, fits_G),
            self.negatives_per_query,
        )
