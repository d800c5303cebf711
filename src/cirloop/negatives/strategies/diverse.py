"""Diverse mining: hard images that differ from one another, so that one cluster of look-alikes does
not fill the list.

`mmr` is maximal marginal relevance (Carbonell & Goldstein, SIGIR 1998): from the `candidate_pool`
best-ranked wrong images, one after another,

    argmax_x  mmr_lambda * s(q, x) - (1 - mmr_lambda) * max_{y chosen} <v_x, v_y>

with v the images' unit vectors; the first has no y and is the best-ranked. `clusters` splits the
gallery by spherical k-means and takes the best-scored image of each of the best clusters other than
the target's.

Degenerate cases: `mmr_lambda` 1 is ranked mining; equal values go to the better-ranked image; a
gallery of fewer images than `num_clusters` makes each a cluster; one in the target's cluster alone
gives nothing.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from cirloop.negatives.base import CandidateBlock, MiningContext, Strategy, top_eligible, top_of
from cirloop.retrieval.arrays import Floats, Rows

SETTINGS = {"mmr": ("candidate_pool", "mmr_lambda"), "clusters": ("num_clusters",)}
"""What each way alone reads."""


class Diverse(Strategy):
    """`negatives_per_query` hard images unlike each other."""

    type: Literal["diverse"] = "diverse"
    method: Literal["mmr", "clusters"] = "mmr"
    """Maximal marginal relevance, or the best of each cluster."""
    candidate_pool: int = Field(100, ge=1)
    """mmr: best-ranked wrong images to choose from, in images."""
    mmr_lambda: float = Field(0.5, ge=0, le=1)
    """mmr: the weight lambda of the score against likeness to what is chosen; 1 = the score
    alone."""
    num_clusters: int = Field(100, ge=2)
    """clusters: how many the gallery is split into."""

    @model_validator(mode="after")
    def _settings_are_used(self) -> Diverse:
        for method, names in SETTINGS.items():
            changed = [
                name
                for name in names
                if getattr(self, name) != type(self).model_fields[name].default
            ]
            if changed and method != self.method:
                raise ValueError(
                    f"{' and '.join(changed)} does nothing with method: {self.method}, only with"
                    f" method: {method}"
                )
        return self

    def choose(self, block: CandidateBlock, context: MiningContext) -> list[Rows]:
        """Up to `negatives_per_query` images: mmr in the order of choice, clusters best-scored
        first.

        Raises UserError where the gallery's vectors are not known.
        """
        context.require(self.type, vectors_GD="the gallery's embeddings")
        vectors_GD = context.vectors_GD
        assert vectors_GD is not None
        if self.method == "mmr":
            windows = top_eligible(block, block.eligible_BK, self.candidate_pool)
            return [self._mmr(block, vectors_GD, i, window) for i, window in enumerate(windows)]
        key = (self.type, self.num_clusters, context.seed)
        if key not in context.cache:
            from cirloop.retrieval.ann import kmeans

            context.cache[key], _ = kmeans(vectors_GD, self.num_clusters, context.seed)
        labels_G = context.cache[key]
        return [self._one_each(block, labels_G, i) for i in range(len(block.query_index_B))]

    def _mmr(self, block: CandidateBlock, vectors_GD: Floats, i: int, window: Rows) -> Rows:
        vectors_WD = np.asarray(vectors_GD[block.gallery_index_BK[i, window]], np.float32)
        value_W = self.mmr_lambda * block.scores_BK[i, window].astype(np.float64)
        likeness_W = np.zeros(len(window))
        chosen: list[int] = []
        while len(chosen) < min(self.negatives_per_query, len(window)):
            marginal_W = value_W - (1 - self.mmr_lambda) * likeness_W
            marginal_W[chosen] = -np.inf
            best = int(marginal_W.argmax()) if chosen else 0
            likeness = (vectors_WD @ vectors_WD[best]).astype(np.float64)
            likeness_W = np.maximum(likeness_W, likeness) if chosen else likeness
            chosen.append(best)
        return window[chosen]

    def _one_each(self, block: CandidateBlock, labels_G: Rows, i: int) -> Rows:
        positions = np.flatnonzero(block.eligible_BK[i])
        label = labels_G[block.gallery_index_BK[i, positions]]
        other = label != labels_G[block.target_B[i]]
        positions = positions[other]
        label = label[other]
        scores = block.scores_BK[i, positions]
        top_C = np.full(labels_G.max(initial=0) + 1, -np.inf, np.float32)
        np.maximum.at(top_C, label, scores)
        at_top = scores == top_C[label]
        # Ties within a cluster: the first position.
        _, first = np.unique(label[at_top], return_index=True)
        return top_of(
            block.scores_BK[i], np.sort(positions[at_top][first]), self.negatives_per_query
        )
