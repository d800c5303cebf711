"""No mining: each iteration trains on the human triplets alone. The control that spends the same steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from cirloop.settings import Settings
from cirloop.types import ImageId, MinedNegative, QueryId, Rankings


class Nothing(Settings):
    """Mines no image, so there is nothing to caption either."""

    type: Literal["none"] = "none"

    @property
    def depth(self) -> int:
        """Ranks to search, in images."""
        return 1

    def mine(
        self, rankings: Rankings, positives: Mapping[QueryId, frozenset[ImageId]], seed: int
    ) -> list[MinedNegative]:
        return []
