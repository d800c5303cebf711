"""Self-made anchors: gallery images without a human text, and the near images that a text is
written for.

An anchor is drawn evenly from the images that are no reference yet, of a human triplet or of an
anchor before. Its neighbours are drawn from a window of ranks by the current model's similarity of
images; copies of the anchor are not ranked. A human text, drawn with it, shows the captioner what
such a text looks like.

Degenerate cases: where fewer images than `num` are no reference yet, all of them are taken; where
the window holds fewer than `neighbors` images, all of those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from pydantic import Field, model_validator

from cirloop.config.base import Settings
from cirloop.retrieval.arrays import Floats, Rows


class AnchorSettings(Settings):
    """Gallery images without a human text for which texts are written too."""

    num: int = Field(0, ge=0)
    """Anchors drawn in each round; 0 = none."""
    neighbors: int = Field(3, ge=1)
    """Near images of an anchor that a text is written for."""
    first_rank: int = Field(1, ge=1)
    """First rank of the window that they are drawn from; the most similar image has rank 1."""
    last_rank: int = Field(10, ge=1)
    """Last rank of the window."""

    @model_validator(mode="after")
    def _has_a_window(self) -> Self:
        if self.last_rank < self.first_rank + self.neighbors - 1:
            raise ValueError(
                f"ranks {self.first_rank} to {self.last_rank} hold fewer than {self.neighbors}"
                " images; raise last_rank or lower neighbors"
            )
        return self


@dataclass(frozen=True, slots=True)
class Anchor:
    """Gallery rows of an anchor and its neighbours, most similar first, with ranks and scores."""

    row: int
    neighbors_N: Rows
    ranks_N: Rows
    scores_N: Floats


def draw_anchors(
    settings: AnchorSettings,
    gallery_GD: Floats,
    content_G: Sequence[str],
    is_reference_G: Sequence[bool],
    rng: np.random.Generator,
) -> list[Anchor]:
    """Draw the anchors of a round.

    `gallery_GD` has a vector for each image, `content_G` what identifies its content;
    `is_reference_G` marks images that are not drawn. Of equal contents one image is drawn at most.
    """
    from cirloop.retrieval.topk import topk  # torch, which reading settings does not need

    _, first_G = np.unique(np.array(content_G), return_index=True)
    free = np.array([row for row in sorted(first_G) if not is_reference_G[row]], np.int64)
    drawn_A = np.sort(rng.choice(free, min(settings.num, len(free)), replace=False))
    if not len(drawn_A):
        return []
    copies: dict[str, list[int]] = {}
    for row, content in enumerate(content_G):
        copies.setdefault(content, []).append(row)
    most = max(len(rows) for rows in copies.values())
    excluded_AE = np.full((len(drawn_A), most), -1, np.int64)
    for a, row in enumerate(drawn_A):
        equal = copies[content_G[row]]
        excluded_AE[a, : len(equal)] = equal
    rows_AK, scores_AK = topk(
        gallery_GD[drawn_A], gallery_GD, settings.last_rank, excluded=excluded_AE
    )
    anchors = []
    for row, near_K, scores_K in zip(drawn_A, rows_AK, scores_AK, strict=True):
        window = np.flatnonzero(near_K >= 0)[settings.first_rank - 1 :]
        num = min(settings.neighbors, len(window))
        chosen = np.sort(rng.choice(window, num, replace=False))
        anchors.append(Anchor(int(row), near_K[chosen], chosen + 1, scores_K[chosen]))
    return anchors
