"""Random mining, the control: `k` images drawn evenly from the ranked ones, for the same queries as `top_k`.

The images a query is given have nothing to do with what the model confuses. Degenerate case: a gallery smaller
than `k` gives all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random as Stream
from typing import Literal

from pydantic import Field

from cirloop.settings import Settings
from cirloop.types import ImageId, MinedNegative, QueryId, Rankings


class Random(Settings):
    """`k` random images for each query whose target is not ranked first."""

    type: Literal["random"] = "random"
    k: int = Field(5, ge=1)
    """Images drawn per query."""

    @property
    def depth(self) -> int:
        """Ranks to search, in images: the whole gallery (0)."""
        return 0

    def mine(
        self, rankings: Rankings, positives: Mapping[QueryId, frozenset[ImageId]], seed: int
    ) -> list[MinedNegative]:
        mined = []
        for i, query in enumerate(rankings.queries):
            if rankings.target_rank_Q[i] == 1:
                continue
            order = list(range(rankings.images_QK.shape[1]))
            Stream(f"{seed}/{query}").shuffle(order)
            kept = [j for j in order if rankings.gallery.ids[rankings.images_QK[i, j]] not in positives[query]]
            for place in sorted(kept[: self.k]):
                mined.append(
                    MinedNegative(
                        query,
                        rankings.gallery.ids[rankings.images_QK[i, place]],
                        place + 1,
                        round(float(rankings.scores_QK[i, place]), 6),
                        int(rankings.target_rank_Q[i]),
                        round(float(rankings.target_score_Q[i]), 6),
                        self.type,
                    )
                )
        return mined
