"""No mining: each iteration trains on the human triplets alone. The control that spends the same
steps."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np

from cirloop.negatives.base import CandidateBlock, MiningContext, Strategy
from cirloop.retrieval.arrays import Rows


class NoMining(Strategy):
    """Mines no image, so there is nothing to caption either."""

    needs_full_gallery: ClassVar[bool] = False
    type: Literal["none"] = "none"

    def choose(self, block: CandidateBlock, context: MiningContext) -> list[Rows]:
        return [np.zeros(0, np.int64) for _ in block.query_index_B]
