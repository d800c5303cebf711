"""Exact search over vectors of any size on disk: each query's best images, and ranks of given
ones. The Q x G matrix is never whole in memory.

Vectors are float16 or float32 arrays, memory-mapped ones too, read part by part. A score is a dot
product in float32; where an image has several vectors (G, M, D), its most similar one counts. A
`device` is torch's name of one, or several with commas (`cuda:0,cuda:1`), which take a part each.

`topk` and `ranks` are exact and break ties by gallery row; `gallery_part.py` has how. They stay
exact where the process allows TF32: `precision.py` keeps it away.

Q queries, G gallery, K kept, M kept of a part, W wanted, D dimensions, B queries of a block, C
pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch

from cirloop.backbones.similarity import similarity
from cirloop.retrieval import gallery_part
from cirloop.retrieval.arrays import Excluded, Floats, Rows, Vectors
from cirloop.retrieval.gallery_part import GalleryPart, first_device, map_parts, tensor
from cirloop.retrieval.precision import float32_products


@float32_products()
def topk(
    queries_QD: Vectors, gallery_GD: Vectors, k: int, device: str = "cpu", excluded: Excluded = None
) -> tuple[Rows, Floats]:
    """Return the gallery rows (Q, K) of each query's `k` best images and their scores, best first,
    ties by row; K <= G.

    `excluded`, sliced by queries, gives an array of gallery rows for each that are not ranked; -1
    is no row. Where too few images are left, rows are -1 and scores -inf.
    """
    k = min(k, len(gallery_GD))

    def search(part: GalleryPart) -> tuple[Rows, Floats]:
        num_kept = min(k, len(part))
        rows_QK = np.empty((len(queries_QD), num_kept), np.int64)
        scores_QK = np.empty((len(queries_QD), num_kept), np.float32)
        for block in part.blocks(len(queries_QD)):
            queries_BD = tensor(queries_QD[block], part.device)
            rows_BK, scores_BK = part.topk(queries_BD, num_kept, _slice(excluded, block))
            rows_QK[block] = rows_BK.cpu().numpy()
            scores_QK[block] = scores_BK.cpu().numpy()
        return rows_QK, scores_QK

    rows_QK, scores_QK = merge_topk(map_parts(search, gallery_GD, device), k)
    rows_QK[np.isneginf(scores_QK)] = -1
    return rows_QK, scores_QK


@float32_products()
def ranks(
    queries_QD: Vectors,
    gallery_GD: Vectors,
    wanted_QW: Rows,
    device: str = "cpu",
    excluded: Excluded = None,
) -> tuple[Rows, Floats]:
    """Return the ranks (Q, W), from 1, of each query's wanted gallery rows, and their scores.

    `excluded` is as in `topk`. The result for a wanted row -1 is arbitrary.
    """
    score_QW = scores_of(queries_QD, gallery_GD, np.maximum(wanted_QW, 0), device)

    def count(part: GalleryPart) -> Rows:
        count_QW = np.zeros(wanted_QW.shape, np.int64)
        for block in part.blocks(len(queries_QD)):
            queries_BD = tensor(queries_QD[block], part.device)
            score_BW = torch.from_numpy(score_QW[block]).to(part.device)
            row_BW = torch.from_numpy(wanted_QW[block] - part.start).to(part.device)
            count_BW = part.count_above(queries_BD, score_BW, row_BW, _slice(excluded, block))
            count_QW[block] = count_BW.cpu().numpy()
        return count_QW

    # In float32 throughout: bfloat16 would leave a twentieth of all images in question.
    counts = map_parts(count, gallery_GD, device, torch.float32)
    return sum(counts, np.ones(wanted_QW.shape, np.int64)), score_QW


@float32_products()
def scores_of(
    queries_QD: Vectors, gallery_GD: Vectors, rows_QW: Rows, device: str = "cpu"
) -> Floats:
    """Return the scores (Q, W) of given gallery rows of each query, equal to those of `topk` and
    `ranks`."""
    device = first_device(device)
    score_QW = np.empty(rows_QW.shape, np.float32)
    if not rows_QW.size:
        return score_QW
    numbers = max(1, rows_QW.shape[1] * int(np.prod(gallery_GD.shape[1:], dtype=np.int64)))
    size = max(1, min(4096, gallery_part.BLOCK_NUMBERS // numbers))
    for start in range(0, len(rows_QW), size):
        block = slice(start, start + size)
        rows, inverse = np.unique(rows_QW[block], return_inverse=True)
        index_BW = inverse.reshape(rows_QW[block].shape)
        query_B1 = np.arange(len(index_BW))[:, None]
        pairs_C, pair_of = np.unique(query_B1 * len(rows) + index_BW, return_inverse=True)
        part = GalleryPart.of(0, gallery_GD[rows], device, torch.float32)
        query_C, row_C = np.divmod(pairs_C, len(rows))
        exact_C = part.exact(
            tensor(queries_QD[block], device),
            torch.from_numpy(query_C).to(device),
            torch.from_numpy(row_C).to(device),
        )
        score_QW[block] = exact_C.cpu().numpy()[pair_of.reshape(index_BW.shape)]
    return score_QW


def score_blocks(
    queries_QD: Vectors, gallery_GD: Vectors, device: str = "cpu"
) -> Iterator[tuple[slice, Floats]]:
    """Yield float32 scores (B, G) of all queries, block by block, each with the slice of its
    queries."""
    device = first_device(device)
    step = gallery_part.part_size(gallery_GD)
    vectors_per_image = int(np.prod(gallery_GD.shape[1:-1], dtype=np.int64))
    size = max(
        1, min(1024, gallery_part.BLOCK_NUMBERS // max(1, len(gallery_GD) * vectors_per_image))
    )
    full_gallery = tensor(gallery_GD, device) if len(gallery_GD) <= step else None  # converted once
    for start in range(0, len(queries_QD), size):
        block = slice(start, min(start + size, len(queries_QD)))
        queries = tensor(queries_QD[block], device)
        if full_gallery is not None:
            yield block, _product(queries, full_gallery)
            continue
        scores_BG = np.empty((len(queries), len(gallery_GD)), np.float32)
        for at in range(0, len(gallery_GD), step):
            part = tensor(gallery_GD[at : at + step], device)
            scores_BG[:, at : at + step] = _product(queries, part)
        yield block, scores_BG


@float32_products()
def _product(queries_BD: torch.Tensor, images: torch.Tensor) -> Floats:
    scores: Floats = similarity(queries_BD, images).cpu().numpy()
    return scores


def merge_topk(parts: Iterable[tuple[Rows, Floats]], k: int) -> tuple[Rows, Floats]:
    """Merge the best images of each part of a gallery into the `k` best, best first, ties by row.

    Parts come in the order of their rows, which count through the whole gallery. The result is
    exact: an image among the `k` best of all is among those of its part.
    """
    rows_QK = np.zeros((0, 0), np.int64)
    scores_QK = np.zeros((0, 0), np.float32)
    for number, (rows_QM, scores_QM) in enumerate(parts):
        if number == 0:
            rows_QK = rows_QM[:, :k]
            scores_QK = scores_QM[:, :k]
            continue
        rows_QK = np.concatenate([rows_QK, rows_QM], 1)
        scores_QK = np.concatenate([scores_QK, scores_QM], 1)
        # stable: of tied images the earlier part's comes first
        order_QK = np.argsort(-scores_QK, axis=1, kind="stable")[:, :k]
        rows_QK = np.take_along_axis(rows_QK, order_QK, 1)
        scores_QK = np.take_along_axis(scores_QK, order_QK, 1)
    return rows_QK, scores_QK


def _slice(excluded: Excluded, block: slice) -> Excluded:
    return None if excluded is None else excluded[block]
