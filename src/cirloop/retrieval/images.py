"""`retrieval.topk` by image ids, as evaluation and search use them. The reference is ranked like
any other image."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from cirloop.retrieval.arrays import Rows, Vectors
from cirloop.retrieval.topk import ranks, scores_of, topk
from cirloop.types import Gallery, ImageId


def topk_images(
    gallery: Gallery, queries_QD: Vectors, gallery_GD: Vectors, k: int
) -> list[list[ImageId]]:
    """Return the `k` best images of each query, best first."""
    rows_QK, _ = topk(queries_QD, gallery_GD, k)
    return [[gallery.ids[row] for row in rows_K] for rows_K in rows_QK]


def ranks_of_images(
    images_of_queries: Sequence[Collection[ImageId]],
    gallery: Gallery,
    queries_QD: Vectors,
    gallery_GD: Vectors,
) -> list[dict[ImageId, int]]:
    """Return per query the rank of each of its `images_of_queries` in the gallery."""
    images, rows_QW = _padded(images_of_queries, gallery)
    ranks_QW, _ = ranks(queries_QD, gallery_GD, rows_QW)
    return [
        dict(zip(names, row.tolist(), strict=False))
        for names, row in zip(images, ranks_QW, strict=True)
    ]


def scores_of_images(
    images_of_queries: Sequence[Collection[ImageId]],
    gallery: Gallery,
    queries_QD: Vectors,
    gallery_GD: Vectors,
) -> list[dict[ImageId, float]]:
    """Return per query the similarity of each of its `images_of_queries`."""
    images, rows_QW = _padded(images_of_queries, gallery)
    scores_QW = scores_of(queries_QD, gallery_GD, np.maximum(rows_QW, 0))
    return [
        dict(zip(names, row.tolist(), strict=False))
        for names, row in zip(images, scores_QW, strict=True)
    ]


def _padded(
    images_of_queries: Sequence[Collection[ImageId]], gallery: Gallery
) -> tuple[list[list[ImageId]], Rows]:
    """Return each query's images in order, and their gallery rows (Q, W), -1 where a query has
    fewer than others."""
    rows = gallery.rows()
    images = [sorted(names) for names in images_of_queries]
    rows_QW = np.full((len(images), max(map(len, images), default=0)), -1, np.int64)
    for row_W, names in zip(rows_QW, images, strict=True):
        row_W[: len(names)] = [rows[name] for name in names]
    return images, rows_QW
