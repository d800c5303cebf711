"""Images that agree with the target in everything but what the text asks for.

Of a query's candidates those where no attribute that the text asks for is known to agree and at
least one is known to differ, while none of the target's other attributes is known to differ and at
least `min_agreeing` are known to agree; the best-scored first. Wanted is the value the text names
or the target's own (`attributes.values.compare_values`). An unknown attribute is neither agreement
nor mismatch. Assumption: such an image is the target without the requested change, so only a model
that reads the text tells them apart. Degenerate cases: a text that asks for nothing known gives
nothing; so does a target without other known attributes, unless `min_agreeing` is 0.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from cirloop.negatives.attributes.eligible import eligible_by_attributes
from cirloop.negatives.attributes.table import Agreement
from cirloop.negatives.base import CandidateBlock, MiningContext, Strategy, top_eligible
from cirloop.retrieval.arrays import Mask, Rows


class AttributeMismatch(Strategy):
    """The `negatives_per_query` best-scored images that differ in what is asked for and in nothing
    else that is known."""

    context_fields: ClassVar[tuple[str, ...]] = ("attributes",)
    type: Literal["attribute_mismatch"] = "attribute_mismatch"
    min_agreeing: int = Field(1, ge=0)
    """Least number of the target's other attributes that are known to agree; 0 = none need be
    known."""

    def choose(self, block: CandidateBlock, context: MiningContext) -> list[Rows]:
        def fits_G(agreement: Agreement) -> Mask:
            asked_G = (agreement.requested_differ_G > 0) & (agreement.requested_agree_G == 0)
            fits: Mask = (
                asked_G
                & (agreement.other_differ_G == 0)
                & (agreement.other_agree_G >= self.min_agreeing)
            )
            return fits

        return top_eligible(
            block,
            eligible_by_attributes(self.type, block, context, fits_G),
            self.negatives_per_query,
        )
