"""Random mining, the control: `k` images drawn evenly from all that may be mined.

The images a query is given have nothing to do with what the model confuses. Degenerate case: a gallery with fewer than
`k` wrong images gives all of them.
"""

from __future__ import annotations

from typing import Literal

from cirloop.negatives.base import About, Block, Rows, Strategy, drawn


class Random(Strategy):
    """`k` random wrong images."""

    type: Literal["random"] = "random"
    only_wrong: bool = True
    """Mine only for queries whose target is not ranked first."""

    def choose(self, block: Block, about: About) -> list[Rows]:
        return drawn(block, block.allowed_BK, self.k, about)
