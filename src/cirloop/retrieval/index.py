"""Best images from a FAISS index, for galleries too large to score in full: flat (exact), IVF or HNSW (approximate).

The index says which images are in question; their scores are computed as in `top.py`, so ranks and ties are the same
for the images found. What an approximate index misses is measured: `recall` of the exact best on sampled queries.
Sources: FAISS (arXiv 2401.08281); HNSW (arXiv 1603.09320). Q queries, G gallery, K kept.
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import numpy as np
import torch

from cirloop.retrieval.blocks import Floats, Rows
from cirloop.retrieval.top import best_rows, exact_scores
from cirloop.types import UserError

logger = logging.getLogger(__name__)
Kind = Literal["flat", "ivf", "hnsw"]
SAMPLED = 200
"""Queries whose best images are also searched exactly."""
LINKS = 32
"""HNSW: neighbours per image."""


def indexed_rows(queries_QD: Any, gallery_GD: Any, k: int, kind: Kind, seed: int = 0) -> tuple[Rows, Floats, float]:
    """Gallery rows (Q, K) of each query's best images by an index, their scores, best first, and the recall.

    Rows that the index did not find are -1 with a score of -inf.
    """
    if gallery_GD.ndim == 3:
        raise UserError(f"search: {kind} is for images of one vector each; this model gives several. Use exact.")
    k = min(k, len(gallery_GD))
    index = build(gallery_GD, kind, seed)
    rows_QK, scores_QK = np.empty((len(queries_QD), k), np.int64), np.empty((len(queries_QD), k), np.float32)
    for start in range(0, len(queries_QD), 4096):
        block = slice(start, start + 4096)
        queries = np.ascontiguousarray(queries_QD[block], np.float32)
        found = np.sort(index.search(queries, k)[1], axis=1)  # by row, so that the stable sort below settles ties
        scores = exact_scores(queries, gallery_GD, np.maximum(found, 0))
        scores[found < 0] = -np.inf
        order = np.argsort(-scores, axis=1, kind="stable")
        rows_QK[block], scores_QK[block] = np.take_along_axis(found, order, 1), np.take_along_axis(scores, order, 1)
    return rows_QK, scores_QK, recall(queries_QD, gallery_GD, rows_QK, seed)


def build(gallery_GD: Any, kind: Kind, seed: int) -> Any:
    """The index; on the GPU where FAISS has one (not HNSW, which lives on the CPU)."""
    import faiss

    size, dimensions = gallery_GD.shape
    vectors = np.ascontiguousarray(gallery_GD, np.float32)
    flat = faiss.IndexFlatIP(dimensions)
    index: Any = flat
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(dimensions, LINKS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction, index.hnsw.efSearch = 200, 256
    elif kind == "ivf":
        lists = max(1, min(int(4 * size**0.5), size // 39))  # FAISS wants 39 vectors a list to train on
        index = faiss.IndexIVFFlat(flat, dimensions, lists, faiss.METRIC_INNER_PRODUCT)
        index.cp.seed, index.nprobe = seed + 1, max(1, lists // 16)
    if kind != "hnsw" and torch.cuda.is_available() and faiss.get_num_gpus():
        index = faiss.index_cpu_to_all_gpus(index)
    if not index.is_trained:
        index.train(vectors)
    index.add(vectors)
    return index


def recall(queries_QD: Any, gallery_GD: Any, rows_QK: Rows, seed: int) -> float:
    """The share of the exact best images that `rows_QK` holds, over at most 200 queries."""
    chosen = np.random.default_rng(seed).permutation(len(queries_QD))[:SAMPLED]
    exact, _ = best_rows(queries_QD[np.sort(chosen)], gallery_GD, rows_QK.shape[1])
    found = [len({*a.tolist()} & {*b.tolist()}) for a, b in zip(exact, rows_QK[np.sort(chosen)], strict=True)]
    share = sum(found) / max(1, exact.size)
    logger.info("the index holds %.4f of the exact best %d images (%d queries)", share, rows_QK.shape[1], len(chosen))
    return share
