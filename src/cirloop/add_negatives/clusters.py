"""Visual clusters: k-means by Lloyd's rounds from images drawn by a seed."""

from __future__ import annotations

import numpy as np

from cirloop.negatives.base import Floats, Rows
from cirloop.negatives.knn_text_samples import Clusters

ROUNDS = 25
IMAGES_PER_CLUSTER = 256
"""Images that centroids are computed from, at most; all are then assigned to them. As FAISS does."""
BLOCK = 1 << 14


def number_for(images: int) -> int:
    """The square root of half the images, 2 to 256."""
    return int(np.clip(round((images / 2) ** 0.5), 2, 256))


def clusters(visual_VD: Floats, num: int, seed: int) -> Clusters:
    """At most `num` clusters, the empty ones left out. The same for the same vectors and seed."""
    random = np.random.default_rng([seed, 3])
    rows = np.sort(random.permutation(len(visual_VD))[: num * IMAGES_PER_CLUSTER])
    centroids = visual_VD[np.sort(random.choice(rows, min(num, len(rows)), replace=False))]
    points, before = visual_VD[rows], None
    for _ in range(ROUNDS):
        nearest = _nearest(points, centroids)
        if before is not None and np.array_equal(nearest, before):
            break
        before = nearest
        found, starts = np.unique(np.sort(nearest), return_index=True)
        sums = np.add.reduceat(points[np.argsort(nearest, kind="stable")], starts, axis=0)
        centroids = centroids.copy()
        centroids[found] = sums / np.bincount(nearest)[found][:, None]
    found, of_V = np.unique(_nearest(visual_VD, centroids), return_inverse=True)
    return Clusters(of_V.astype(np.int64), centroids[found])


def _nearest(points: Floats, centroids: Floats) -> Rows:
    """The nearest centroid of each point by Euclidean distance, ties by number."""
    half = (centroids**2).sum(axis=1) / 2
    blocks = (points[start : start + BLOCK] for start in range(0, len(points), BLOCK))
    return np.concatenate([np.argmax(block @ centroids.T - half, axis=1) for block in blocks])
