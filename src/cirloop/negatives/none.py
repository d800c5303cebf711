"""No mining: each iteration trains on the human triplets alone. The control that spends the same steps."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np

from cirloop.negatives.base import About, Block, Rows, Strategy


class Nothing(Strategy):
    """Mines no image, so there is nothing to caption either."""

    whole: ClassVar[bool] = False
    type: Literal["none"] = "none"
    fallback: Literal["none"] = "none"
    """Nothing fills up."""

    def choose(self, block: Block, about: About) -> list[Rows]:
        return [np.zeros(0, np.int64) for _ in block.numbers_B]
