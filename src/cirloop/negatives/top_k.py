"""Ranked mining: the highest-ranked wrong images of the queries the model gets wrong.

For a query whose target is not first, the best `k` images that are neither the reference (rankings leave it
out), the target, nor another known positive. Source: the mining step of ReCALL (CVPR 2026, arXiv 2602.01639).
Degenerate cases: a query whose target is first gives nothing; a gallery with fewer wrong images gives those
there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from cirloop.settings import Settings
from cirloop.types import ImageId, MinedNegative, QueryId, Rankings


class TopK(Settings):
    """The top `k` wrong images of each query whose target is not ranked first."""

    type: Literal["top_k"] = "top_k"
    k: int = Field(5, ge=1)
    """Wrong images kept per query."""

    @property
    def depth(self) -> int:
        """Ranks to search, in images."""
        return self.k

    def mine(
        self, rankings: Rankings, positives: Mapping[QueryId, frozenset[ImageId]], seed: int
    ) -> list[MinedNegative]:
        mined = []
        for i, query in enumerate(rankings.queries):
            if rankings.target_rank_Q[i] == 1:
                continue
            kept = 0
            for place, row in enumerate(rankings.images_QK[i]):
                image = rankings.gallery.ids[row]
                if image in positives[query] or kept == self.k:
                    continue
                kept += 1
                mined.append(
                    MinedNegative(
                        query,
                        image,
                        place + 1,
                        round(float(rankings.scores_QK[i, place]), 6),
                        int(rankings.target_rank_Q[i]),
                        round(float(rankings.target_score_Q[i]), 6),
                        self.type,
                    )
                )
        return mined
