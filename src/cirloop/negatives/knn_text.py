"""`knn_text`: images that look like the target and whose text is far.

Among the `k_nn` images most similar in looks to the query's target, at or above a similarity floor, those whose text
side is less similar to the query's text than a threshold; while it lets too few through it is raised by 0.09, at most
twice. `knn_text_samples.py` is the same rule for samples of an image and a text each (`add_hard_negatives.py`).

Degenerate cases: where nothing is at or above the floor, or every text is at or above the last threshold, there is no
negative. Similarities are dot products of vectors of unit norm.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from cirloop.negatives.base import About, Block, Floats, Rows, Strategy, best_of

RAISES = 3
"""Thresholds tried: the given one and two raised ones."""
STEP = 0.09


def thresholds(first: float) -> Floats:
    """The threshold and its two raised values."""
    return np.array([round(first + STEP * i, 6) for i in range(RAISES)], np.float32)


class KnnText(Strategy):
    """Images that look like the target and whose text is far from the query's, the most alike in looks first.

    The threshold is raised, at most twice, while it lets fewer than `k` through. Needs the gallery's vectors and the
    similarities of the texts.
    """

    type: Literal["knn_text"] = "knn_text"
    k_nn: int = Field(30, ge=1)
    """Images most similar to the target that are looked at."""
    cosine_threshold: float = Field(0.3, ge=-1, le=1)
    """Text similarity below which an image is taken; raised by 0.09, twice."""
    min_visual_similarity: float = Field(0.3, ge=-1, le=1)
    """Similarity to the target that an image needs; -1 = any."""

    def choose(self, block: Block, about: About) -> list[Rows]:
        return [rows[: self.k] for rows in self.sets(block, about)]

    def sets(self, block: Block, about: About) -> list[Rows]:
        about.need(self.type, vectors_GD="the gallery's vectors", text_scores="similarities of the texts alone")
        assert about.vectors_GD is not None
        visual_BG = _similarities(about.vectors_GD, block.target_B)
        text_BG = about.text_scores(block.numbers_B)
        eligible_BG = block.allowed_BK & (visual_BG >= np.float32(self.min_visual_similarity))
        out = []
        for visual, text, eligible in zip(visual_BG, text_BG, eligible_BG, strict=True):
            near = best_of(visual, np.flatnonzero(eligible), self.k_nn)
            kept = near[:0]
            for threshold in thresholds(self.cosine_threshold):
                if len(kept) < self.k:
                    kept = near[text[near] < threshold]
            out.append(kept)
        return out


def _similarities(vectors_GD: Floats, rows_B: Rows, step: int = 1 << 14) -> Floats:
    """Float32 similarities (B, G) of some images to all; float16 vectors, also mapped from a file, in parts."""
    mine_BD, out = np.asarray(vectors_GD[rows_B], np.float32), np.empty((len(rows_B), len(vectors_GD)), np.float32)
    for start in range(0, len(vectors_GD), step):
        out[:, start : start + step] = mine_BD @ np.asarray(vectors_GD[start : start + step], np.float32).T
    return out
