"""Images that agree with the target in everything but what the text asks for.

Of a query's candidates those where no attribute that the text asks for is known to agree and at least one is known to
differ, while none of the target's other attributes is known to differ and at least `agreed` are known to agree; the
best-scored first. Wanted is the value the text names or the target's own (`attributes.values.verdict`). An unknown
attribute is neither agreement nor mismatch. Assumption: such an image is the target without the requested change, so
only a model that reads the text tells them apart. Degenerate cases: a text that asks for nothing known gives nothing;
so does a target without other known attributes, unless `agreed` is 0.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from cirloop.negatives.attributes.table import Table
from cirloop.negatives.base import About, Block, Rows, Strategy, hardest


class AttributeMismatch(Strategy):
    """The `k` best-scored images that differ in what is asked for and in nothing else that is known."""

    knowledge: ClassVar[tuple[str, ...]] = ("attributes",)
    type: Literal["attribute_mismatch"] = "attribute_mismatch"
    agreed: int = Field(1, ge=0)
    """Least number of the target's other attributes that are known to agree; 0 = none need be known."""

    def choose(self, block: Block, about: About) -> list[Rows]:
        about.need(
            self.type,
            attributes="attributes of the gallery's images: negatives.attributes",
            asked="attributes the texts ask for: negatives.attributes",
        )
        assert about.attributes is not None and about.asked is not None
        table, eligible_BK = Table.of(about.attributes), np.zeros_like(block.allowed_BK)
        for i, number in enumerate(block.numbers_B):
            found = table.agreement(about.asked[number], int(block.target_B[i]))
            asked_G = (found.asked_differ_G > 0) & (found.asked_agree_G == 0)
            other_G = (found.other_differ_G == 0) & (found.other_agree_G >= self.agreed)
            eligible_BK[i] = block.allowed_BK[i] & (asked_G & other_G)[block.columns_BK[i]]
        return hardest(block, eligible_BK, self.k)
