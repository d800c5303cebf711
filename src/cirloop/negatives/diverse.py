"""Diverse mining: hard images that differ from one another, so that one cluster of look-alikes does not fill the list.

`mmr` is maximal marginal relevance (Carbonell & Goldstein, SIGIR 1998): from the `window` best-ranked wrong images,
one after another,

    argmax_x  balance * s(q, x) - (1 - balance) * max_{y chosen} <v_x, v_y>

with v the images' unit vectors; the first has no y and is the best-ranked. `clusters` splits the gallery by spherical
k-means and takes the best-scored image of each of the `k` best clusters other than the target's.

Degenerate cases: `balance` 1 is ranked mining; equal values go to the better-ranked image; a gallery of fewer images
than `num_clusters` makes each a cluster; one in the target's cluster alone gives nothing.
"""

from __future__ import annotations

import weakref
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from cirloop.negatives.base import About, Block, Floats, Rows, Strategy, best_of, hardest

SETTINGS = {"mmr": ("window", "balance"), "clusters": ("num_clusters",)}
"""What each way alone reads."""


class Diverse(Strategy):
    """`k` hard images unlike each other."""

    type: Literal["diverse"] = "diverse"
    how: Literal["mmr", "clusters"] = "mmr"
    """Maximal marginal relevance, or the best of each cluster."""
    window: int = Field(100, ge=1)
    """mmr: best-ranked wrong images to choose from, in images."""
    balance: float = Field(0.5, ge=0, le=1)
    """mmr: the weight lambda of the score against likeness to what is chosen; 1 = the score alone."""
    num_clusters: int = Field(100, ge=2)
    """clusters: how many the gallery is split into."""

    @model_validator(mode="after")
    def _settings_are_used(self) -> Diverse:
        for how, names in SETTINGS.items():
            changed = [name for name in names if getattr(self, name) != type(self).model_fields[name].default]
            if changed and how != self.how:
                raise ValueError(f"{' and '.join(changed)} does nothing with how: {self.how}, only with how: {how}")
        return self

    def choose(self, block: Block, about: About) -> list[Rows]:
        """Up to `k` images: mmr in the order of choice, clusters best-scored first.

        Raises UserError where the gallery's vectors are not known.
        """
        about.need(self.type, vectors_GD="the gallery's embeddings")
        vectors_GD: Floats = about.vectors_GD  # type: ignore[assignment]  # need() has seen to it
        if self.how == "mmr":
            windows = hardest(block, block.allowed_BK, self.window)
            return [self._mmr(block, vectors_GD, i, window) for i, window in enumerate(windows)]
        labels_G = clusters(vectors_GD, self.num_clusters, about.seed)
        return [self._one_each(block, labels_G, i) for i in range(len(block.numbers_B))]

    def _mmr(self, block: Block, vectors_GD: Floats, i: int, window: Rows) -> Rows:
        vectors_WD = np.asarray(vectors_GD[block.columns_BK[i, window]], np.float32)
        value_W = self.balance * block.scores_BK[i, window].astype(np.float64)
        likeness_W = np.zeros(len(window))
        chosen: list[int] = []
        while len(chosen) < min(self.k, len(window)):
            marginal_W = value_W - (1 - self.balance) * likeness_W
            marginal_W[chosen] = -np.inf
            best = int(marginal_W.argmax()) if chosen else 0
            likeness = (vectors_WD @ vectors_WD[best]).astype(np.float64)
            likeness_W = np.maximum(likeness_W, likeness) if chosen else likeness
            chosen.append(best)
        return window[chosen]

    def _one_each(self, block: Block, labels_G: Rows, i: int) -> Rows:
        positions = np.flatnonzero(block.allowed_BK[i])
        label = labels_G[block.columns_BK[i, positions]]
        other = label != labels_G[block.target_B[i]]
        positions, label = positions[other], label[other]
        scores = block.scores_BK[i, positions]
        top_C = np.full(labels_G.max(initial=0) + 1, -np.inf, np.float32)
        np.maximum.at(top_C, label, scores)
        at_top = scores == top_C[label]
        _, first = np.unique(label[at_top], return_index=True)  # ties within a cluster: the first position
        return best_of(block.scores_BK[i], np.sort(positions[at_top][first]), self.k)


_labels: dict[tuple[int, int, int], tuple[weakref.ref[Any], Rows]] = {}
"""Labels of each array in use, by its id, the clusters and the seed; they go when the array goes."""


def clusters(vectors_GD: Floats, num_clusters: int, seed: int) -> Rows:
    """(G,) cluster of each unit vector, by spherical k-means; worked out once per array, which must not change."""
    key = (id(vectors_GD), num_clusters, seed)
    if key not in _labels:
        known = weakref.ref(vectors_GD, lambda _: _labels.pop(key, None))
        _labels[key] = (known, _kmeans(vectors_GD, min(num_clusters, len(vectors_GD)), seed % 2**31))
    return _labels[key][1]


def _kmeans(vectors_GD: Floats, num_clusters: int, seed: int) -> Rows:
    import faiss

    vectors_GD = np.ascontiguousarray(vectors_GD, np.float32)
    kmeans = faiss.Kmeans(vectors_GD.shape[1], num_clusters, seed=seed, spherical=True, min_points_per_centroid=1)
    kmeans.train(vectors_GD)
    return np.asarray(kmeans.index.search(vectors_GD, 1)[1][:, 0], np.int64)
