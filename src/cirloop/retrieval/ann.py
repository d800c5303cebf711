"""FAISS indexes for galleries too large to score in full (flat, which is exact, IVF, IVF-PQ, HNSW),
and k-means.

The index selects candidates; their scores are computed as in `topk.py`, so ranks and ties are the
same for these images. `recall` measures what an approximate index misses: its share of the exact
best images of sampled queries. The gallery is read part by part; what the index itself holds in
memory is in docs/scaling.md. DataPaths: FAISS (arXiv 2401.08281); HNSW (arXiv 1603.09320); product
quantisation (Jegou et al., PAMI 2011). Q queries, G gallery, K kept.
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import numpy as np
import torch

from cirloop.retrieval.arrays import Floats, Rows, Vectors
from cirloop.retrieval.config import IndexSettings
from cirloop.retrieval.gallery_part import part_size
from cirloop.retrieval.topk import scores_of, topk
from cirloop.types import UserError

logger = logging.getLogger(__name__)
Kind = Literal["flat", "ivf", "ivf_pq", "hnsw"]
SEARCHED_QUERIES = 4096
"""Queries that the index searches at once."""
SAMPLED = 200
"""Queries that are also searched exactly, to measure the recall."""
HNSW_NEIGHBORS = 32
"""HNSW: neighbours per image."""
MIN_PER_CENTROID = 39
"""Vectors per list or code that FAISS wants to train on."""
GPU_LIMIT = 2048
"""Images per query, and lists, that FAISS searches on a GPU."""


def ann_topk(
    queries_QD: Vectors,
    gallery_GD: Vectors,
    k: int,
    kind: Kind,
    settings: IndexSettings | None = None,
    seed: int = 0,
    excluded_QE: Rows | None = None,
) -> tuple[Rows, Floats, float]:
    """Return gallery rows (Q, K) of each query's best images by an index, their scores, best first,
    and the recall.

    Rows that the index misses, and those in `excluded_QE`, are -1 with a score of -inf.
    Raises UserError for settings that do not fit the gallery.
    """
    if gallery_GD.ndim == 3:
        raise UserError(
            f"search: {kind} is for images of one vector each; this model gives several. Use exact."
        )
    settings = settings or IndexSettings()
    k = min(k, len(gallery_GD))
    depth = k if excluded_QE is None else k + excluded_QE.shape[1]
    num_candidates = min(depth * (settings.candidates if kind == "ivf_pq" else 1), len(gallery_GD))
    index = build(gallery_GD, kind, settings, seed, num_candidates)
    rows_QK = np.empty((len(queries_QD), k), np.int64)
    scores_QK = np.empty((len(queries_QD), k), np.float32)
    for start in range(0, len(queries_QD), SEARCHED_QUERIES):
        block = slice(start, start + SEARCHED_QUERIES)
        queries = np.ascontiguousarray(queries_QD[block], np.float32)
        # by row, so that the stable sort below settles ties
        candidates = np.sort(index.search(queries, num_candidates)[1], axis=1)
        scores = scores_of(queries, gallery_GD, np.maximum(candidates, 0))
        missing = candidates < 0
        if excluded_QE is not None:
            missing |= (candidates[:, :, None] == excluded_QE[block][:, None]).any(axis=2)
        scores[missing] = -np.inf
        candidates[missing] = -1
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        rows_QK[block] = np.take_along_axis(candidates, order, 1)
        scores_QK[block] = np.take_along_axis(scores, order, 1)
    return rows_QK, scores_QK, recall(queries_QD, gallery_GD, rows_QK, seed, excluded_QE)


def build(
    gallery_GD: Vectors, kind: Kind, settings: IndexSettings, seed: int, num_candidates: int
) -> Any:
    """Build the index.

    Where FAISS has GPUs, flat and IVF live there as far as it can search them there, and the lists
    of IVF-PQ are learnt there; HNSW is built and searched on the CPU.
    """
    import faiss

    index = _empty(gallery_GD, kind, settings, seed)
    nlist = getattr(index, "nlist", 0)  # an index on GPUs lacks the attribute
    # without a GPU, FAISS's GPU functions crash the process
    on_gpus = torch.cuda.is_available() and faiss.get_num_gpus()
    if (
        on_gpus
        and kind in ("flat", "ivf")
        and max(num_candidates, getattr(index, "nprobe", 0)) <= GPU_LIMIT
    ):
        index = faiss.index_cpu_to_all_gpus(index)
    elif on_gpus and kind in ("ivf", "ivf_pq"):
        # the index does not own these, so both must last until it is trained
        resources = faiss.StandardGpuResources()
        learner = faiss.index_cpu_to_gpu(resources, 0, faiss.IndexFlatIP(gallery_GD.shape[1]))
        index.clustering_index = learner
    if not index.is_trained:
        index.train(_sample(gallery_GD, kind, nlist, settings, seed))
    if hasattr(index, "clustering_index"):
        index.clustering_index = None
    step = part_size(gallery_GD)
    for start in range(0, len(gallery_GD), step):
        index.add(np.ascontiguousarray(gallery_GD[start : start + step], np.float32))
    return index


def _empty(gallery_GD: Vectors, kind: Kind, settings: IndexSettings, seed: int) -> Any:
    import faiss

    size, width = gallery_GD.shape
    flat: Any = faiss.IndexFlatIP(width)
    if kind == "flat":
        return flat
    if kind == "hnsw":
        index: Any = faiss.IndexHNSWFlat(width, HNSW_NEIGHBORS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = 200
        index.hnsw.efSearch = 256
        return index
    nlist = settings.nlist or max(1, min(int(4 * size**0.5), size // MIN_PER_CENTROID))
    if nlist > size or settings.nprobe > nlist:
        raise UserError(
            f"index: nlist {nlist} must be at most the gallery's {size} images, and nprobe "
            f"{settings.nprobe} at most nlist."
        )
    if kind == "ivf":
        index = faiss.IndexIVFFlat(flat, width, nlist, faiss.METRIC_INNER_PRODUCT)
    else:
        m = settings.m or (width // 4 if width % 4 == 0 else width)
        if width % m or size < 2**settings.nbits:
            raise UserError(
                f"index: m {m} must divide the vectors' width {width}, and nbits {settings.nbits}"
                f" needs a gallery of {2**settings.nbits} images at least, found {size}."
            )
        index = faiss.IndexIVFPQ(flat, width, nlist, m, settings.nbits, faiss.METRIC_INNER_PRODUCT)
        index.pq.cp.seed = seed + 1
    index.cp.seed = seed + 1
    index.nprobe = settings.nprobe or max(1, nlist // 16)
    return index


def _sample(
    gallery_GD: Vectors, kind: Kind, nlist: int, settings: IndexSettings, seed: int
) -> Floats:
    """Draw vectors to train on, in the gallery's order."""
    codes = MIN_PER_CENTROID * 2**settings.nbits if kind == "ivf_pq" else 0
    training_size = min(settings.training_size or max(64 * nlist, codes), len(gallery_GD))
    minimum = max(nlist, 2**settings.nbits if kind == "ivf_pq" else 0)
    if training_size < minimum:
        raise UserError(
            f"index.training_size {training_size} must be at least {minimum}, the lists or the"
            " codes of a part."
        )
    rows = np.sort(np.random.default_rng(seed).permutation(len(gallery_GD))[:training_size])
    return np.ascontiguousarray(gallery_GD[rows], np.float32)


def recall(
    queries_QD: Vectors,
    gallery_GD: Vectors,
    rows_QK: Rows,
    seed: int,
    excluded_QE: Rows | None = None,
) -> float:
    """Return the share of the exact best images that `rows_QK` holds, over at most 200 queries."""
    sample = np.sort(np.random.default_rng(seed).permutation(len(queries_QD))[:SAMPLED])
    excluded = None if excluded_QE is None else excluded_QE[sample]
    exact, _ = topk(queries_QD[sample], gallery_GD, rows_QK.shape[1], excluded=excluded)
    held = sum(
        np.isin(best[best >= 0], rows).sum()
        for best, rows in zip(exact, rows_QK[sample], strict=True)
    )
    share = float(held / max(1, np.count_nonzero(exact >= 0)))
    logger.info(
        "the index holds %.4f of the exact best %d images (%d queries)",
        share,
        rows_QK.shape[1],
        len(sample),
    )
    return share


def kmeans(vectors_ND: Vectors, num_clusters: int, seed: int) -> tuple[Rows, Floats]:
    """Return the cluster (N,) of each unit vector and the unit centroids (C, D), by spherical
    k-means."""
    import faiss

    points_ND = np.ascontiguousarray(vectors_ND, np.float32)
    num = min(num_clusters, len(points_ND))
    clustering = faiss.Kmeans(
        points_ND.shape[1], num, seed=seed % 2**31, spherical=True, min_points_per_centroid=1
    )
    clustering.train(points_ND)
    label_N = clustering.index.search(points_ND, 1)[1][:, 0]
    return np.asarray(label_N, np.int64), np.asarray(clustering.centroids)
