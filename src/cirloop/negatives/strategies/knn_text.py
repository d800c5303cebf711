"""`knn_text`: images that look like the target and whose text is far.

Among the `k_nn` images most similar in looks to the query's target, at or above a similarity floor,
those whose text side is less similar to the query's text than a threshold; while it lets too few
through it is raised by 0.09, at most twice. `knn_text_samples.py` is the same rule for samples of
an image and a text each (`add_hard_negatives.py`).

Degenerate cases: where nothing is at or above the floor, or every text is at or above the last
threshold, there is no negative. Similarities are dot products of vectors of unit norm.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from cirloop.negatives.base import CandidateBlock, MiningContext, Strategy, top_of
from cirloop.retrieval.arrays import Floats, Rows
from cirloop.retrieval.dense import all_scores

RAISES = 3
"""Thresholds tried: the given one and two raised ones."""
STEP = 0.09


def thresholds(first: float) -> Floats:
    """Return the threshold and its two raised values."""
    return np.array([round(first + STEP * i, 6) for i in range(RAISES)], np.float32)


class KnnText(Strategy):
    """Images that look like the target and whose text is far from the query's, the most alike in
    looks first.

    The threshold is raised, at most twice, while it lets fewer than `negatives_per_query` through.
    Needs the gallery's vectors and the similarities of the texts.
    """

    type: Literal["knn_text"] = "knn_text"
    k_nn: int = Field(30, ge=1)
    """Images most similar to the target that are looked at."""
    cosine_threshold: float = Field(0.3, ge=-1, le=1)
    """Text similarity below which an image is taken; raised by 0.09, twice."""
    min_visual_similarity: float = Field(0.3, ge=-1, le=1)
    """Similarity to the target that an image needs; -1 = any."""

    def choose(self, block: CandidateBlock, context: MiningContext) -> list[Rows]:
        return [rows[: self.negatives_per_query] for rows in self.candidate_sets(block, context)]

    def candidate_sets(self, block: CandidateBlock, context: MiningContext) -> list[Rows]:
        context.require(
            self.type,
            vectors_GD="the gallery's vectors",
            text_scores="similarities of the texts alone",
        )
        assert context.vectors_GD is not None and context.text_scores is not None
        visual_BG = all_scores(context.vectors_GD[block.target_B], context.vectors_GD)
        text_BG = context.text_scores(block.query_index_B)
        eligible_BG = block.eligible_BK & (visual_BG >= np.float32(self.min_visual_similarity))
        out = []
        for visual, text, eligible in zip(visual_BG, text_BG, eligible_BG, strict=True):
            near = top_of(visual, np.flatnonzero(eligible), self.k_nn)
            kept = near[:0]
            for threshold in thresholds(self.cosine_threshold):
                if len(kept) < self.negatives_per_query:
                    kept = near[text[near] < threshold]
            out.append(kept)
        return out
