"""Query and gallery vectors to rankings. Never a whole Q x G matrix in memory.

Where an image has several vectors (G, M, D), its most similar one counts.
The reference is not ranked; ties are broken by gallery row, which is by id. Two ways, equal up to float
rounding: `exact` sorts blocks of scores, `faiss` asks a flat inner-product index.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from cirloop.backbones.similarity import similarity
from cirloop.retrieval.blocks import BLOCK_NUMBERS
from cirloop.types import Gallery, ImageId, Query, Rankings, UserError

BLOCK = 256
"""Queries scored at once, fewer where the gallery is so large that their scores would be more than BLOCK_NUMBERS."""
Floats = npt.NDArray[np.float32]


def rank(
    queries: Sequence[Query],
    targets: Sequence[ImageId],
    gallery: Gallery,
    queries_QD: Floats,
    gallery_GD: Floats,
    depth: int,
    search: Literal["exact", "faiss"] = "exact",
) -> Rankings:
    """The best `depth` images per query (0 = all) and each target's rank and score."""
    rows = gallery.rows()
    num = len(gallery.ids) - 1
    depth = num if depth == 0 else min(depth, num)
    reference_Q = np.array([rows[query.reference] for query in queries], np.int64)
    target_Q = np.array([rows[target] for target in targets], np.int64)
    images_QK = np.empty((len(queries), depth), np.int32)
    scores_QK = np.empty((len(queries), depth), np.float32)
    rank_Q = np.empty(len(queries), np.int32)
    score_Q = np.empty(len(queries), np.float32)
    for block in _blocks(len(queries), gallery_GD):
        scores_BG = similarity(queries_QD[block], gallery_GD)
        here = np.arange(len(scores_BG))
        score_B = scores_BG[here, target_Q[block]]
        scores_BG[here, reference_Q[block]] = -np.inf
        column = np.arange(scores_BG.shape[1])
        ahead_BG = (scores_BG > score_B[:, None]) | (
            (scores_BG == score_B[:, None]) & (column < target_Q[block][:, None])
        )
        rank_Q[block], score_Q[block] = ahead_BG.sum(axis=1) + 1, score_B
        if search == "exact":
            best = best_columns(scores_BG, depth)
            images_QK[block], scores_QK[block] = best, np.take_along_axis(scores_BG, best, axis=1)
    if search == "faiss":
        images_QK, scores_QK = _faiss(queries_QD, gallery_GD, reference_Q, depth)
    return Rankings(tuple(q.id for q in queries), gallery, images_QK, scores_QK, rank_Q, score_Q)


def places(
    queries: Sequence[Query],
    wanted: Sequence[Collection[ImageId]],
    gallery: Gallery,
    queries_QD: Floats,
    gallery_GD: Floats,
) -> list[dict[ImageId, int]]:
    """Per query the place of each of its `wanted` images among all of the gallery, the reference too.

    From 1, ties by gallery row.
    """
    rows = gallery.rows()
    out: list[dict[ImageId, int]] = []
    for block in _blocks(len(queries), gallery_GD):
        for scores_G, images in zip(similarity(queries_QD[block], gallery_GD), wanted[block], strict=True):
            of = {image: rows[image] for image in images}
            out.append(
                {
                    image: int((scores_G > scores_G[row]).sum() + (scores_G[:row] == scores_G[row]).sum()) + 1
                    for image, row in of.items()
                }
            )
    return out


def scores(
    queries: Sequence[Query],
    wanted: Sequence[Collection[ImageId]],
    gallery: Gallery,
    queries_QD: Floats,
    gallery_GD: Floats,
) -> list[dict[ImageId, float]]:
    """Per query the similarity of each of its `wanted` images."""
    rows = gallery.rows()
    return [
        {image: float(similarity(query_D[None], gallery_GD[rows[image]][None])[0, 0]) for image in sorted(images)}
        for query_D, images in zip(queries_QD, wanted, strict=True)
    ]


def best(
    queries: Sequence[Query], gallery: Gallery, queries_QD: Floats, gallery_GD: Floats, depth: int
) -> list[list[ImageId]]:
    """The best `depth` images per query, the reference ranked too, best first, ties by gallery row."""
    out: list[list[ImageId]] = []
    for block in _blocks(len(queries), gallery_GD):
        columns = best_columns(similarity(queries_QD[block], gallery_GD), min(depth, len(gallery.ids)))
        out += [[gallery.ids[column] for column in row] for row in columns]
    return out


def _blocks(num_queries: int, gallery_GD: Floats) -> Iterator[slice]:
    vectors = len(gallery_GD) * (gallery_GD.shape[1] if gallery_GD.ndim == 3 else 1)
    size = max(1, min(BLOCK, BLOCK_NUMBERS // max(1, vectors)))
    return (slice(start, start + size) for start in range(0, num_queries, size))


def best_columns(scores_BG: Floats, depth: int) -> npt.NDArray[np.int64]:
    """Columns of the `depth` largest per row, best first, ties by column."""
    if depth < scores_BG.shape[1] // 4:
        # everything at least as good as the depth-th, so that ties at the edge are settled by column too
        edge_B = np.partition(scores_BG, -depth, axis=1)[:, -depth]
        return np.stack(
            [
                _sorted_columns(row, np.flatnonzero(row >= edge))[:depth]
                for row, edge in zip(scores_BG, edge_B, strict=True)
            ]
        )
    return np.argsort(-scores_BG, axis=1, kind="stable")[:, :depth]


def _sorted_columns(row: Floats, columns: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return columns[np.argsort(-row[columns], kind="stable")]


def _faiss(
    queries_QD: Floats, gallery_GD: Floats, reference_Q: npt.NDArray[np.int64], depth: int
) -> tuple[npt.NDArray[np.int32], Floats]:
    import faiss

    if gallery_GD.ndim == 3:
        raise UserError("runtime.search: faiss is for images of one vector each; this model gives several. Use exact.")

    index = faiss.IndexFlatIP(gallery_GD.shape[1])
    index.add(gallery_GD)
    images_QK = np.empty((len(queries_QD), depth), np.int32)
    scores_QK = np.empty((len(queries_QD), depth), np.float32)
    left, reach = list(range(len(queries_QD))), depth + 2  # the reference, and one to see the edge by
    while left:
        reach = min(reach, len(gallery_GD))
        tied = []
        for i, scores, images in zip(left, *index.search(queries_QD[left], reach), strict=True):
            order = np.lexsort((images, -scores))
            best = order[images[order] != reference_Q[i]][:depth]
            images_QK[i], scores_QK[i] = images[best], scores[best]
            if reach < len(gallery_GD) and scores[best[-1]] == scores[order[-1]]:
                tied.append(i)  # images not seen yet may tie with the last one kept, and come before it
        left, reach = tied, 2 * reach
    return images_QK, scores_QK
