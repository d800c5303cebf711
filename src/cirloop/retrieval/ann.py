"""FAISS: indexes for galleries too large to score in full (flat, which is exact, IVF, IVF-PQ,
HNSW), and k-means.

The index says which images are in question; their scores are computed as in `topk.py`, so ranks and
ties are the same for the images found. What an approximate index misses is measured: `recall` of
the exact best on sampled queries. The gallery is read part by part; what the index itself holds in
memory is in docs/scaling.md. Sources: FAISS (arXiv 2401.08281); HNSW (arXiv 1603.09320); product
quantisation (Jegou et al., PAMI 2011). Q queries, G gallery, K kept.
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import numpy as np
import torch

from cirloop.retrieval.config import IndexSettings
from cirloop.retrieval.topk import Floats, Rows, part_size, scores_of, topk
from cirloop.types import UserError

logger = logging.getLogger(__name__)
Kind = Literal["flat", "ivf", "ivf_pq", "hnsw"]
QUERIES = 4096
"""Queries that the index is asked at once."""
SAMPLED = 200
"""Queries whose best images are also searched exactly."""
LINKS = 32
"""HNSW: neighbours per image."""
ENOUGH = 39
"""Vectors per list or code that FAISS wants to train on."""
GPU_LIMIT = 2048
"""Images per query, and lists, that FAISS searches on a GPU."""


def ann_topk(
    queries_QD: Any,
    gallery_GD: Any,
    k: int,
    kind: Kind,
    settings: IndexSettings | None = None,
    seed: int = 0,
    excluded_QE: Rows | None = None,
) -> tuple[Rows, Floats, float]:
    """Gallery rows (Q, K) of each query's best images by an index, their scores, best first, and
    the recall.

    Rows that the index did not find, and those in `excluded_QE`, are -1 with a score of -inf.
    Raises UserError for settings that do not fit the gallery.
    """
    if gallery_GD.ndim == 3:
        raise UserError(
            f"search: {kind} is for images of one vector each; this model gives several. Use exact."
        )
    settings = settings or IndexSettings()
    k = min(k, len(gallery_GD))
    wanted = k if excluded_QE is None else k + excluded_QE.shape[1]
    reach = min(wanted * (settings.candidates if kind == "ivf_pq" else 1), len(gallery_GD))
    index = build(gallery_GD, kind, settings, seed, reach)
    rows_QK = np.empty((len(queries_QD), k), np.int64)
    scores_QK = np.empty((len(queries_QD), k), np.float32)
    for start in range(0, len(queries_QD), QUERIES):
        block = slice(start, start + QUERIES)
        queries = np.ascontiguousarray(queries_QD[block], np.float32)
        found = np.sort(
            index.search(queries, reach)[1], axis=1
        )  # by row, so that the stable sort below settles ties
        scores = scores_of(queries, gallery_GD, np.maximum(found, 0))
        lost = found < 0
        if excluded_QE is not None:
            lost |= (found[:, :, None] == excluded_QE[block][:, None]).any(axis=2)
        scores[lost] = -np.inf
        found[lost] = -1
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        rows_QK[block] = np.take_along_axis(found, order, 1)
        scores_QK[block] = np.take_along_axis(scores, order, 1)
    return rows_QK, scores_QK, recall(queries_QD, gallery_GD, rows_QK, seed, excluded_QE)


def build(gallery_GD: Any, kind: Kind, settings: IndexSettings, seed: int, reach: int) -> Any:
    """The index. Where FAISS has GPUs, flat and IVF live there as far as it can search them there,
    and the lists of IVF-PQ are learnt there; HNSW is built and searched on the CPU."""
    import faiss

    index = _empty(gallery_GD, kind, settings, seed)
    nlist = getattr(index, "nlist", 0)  # what it becomes on GPUs has no such name
    on_gpus = (
        torch.cuda.is_available() and faiss.get_num_gpus()
    )  # without one, FAISS's GPU functions crash the process
    if on_gpus and kind in ("flat", "ivf") and max(reach, getattr(index, "nprobe", 0)) <= GPU_LIMIT:
        index = faiss.index_cpu_to_all_gpus(index)
    elif on_gpus and kind in (
        "ivf",
        "ivf_pq",
    ):  # the index does not own them, so both must last until it is trained
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


def _empty(gallery_GD: Any, kind: Kind, settings: IndexSettings, seed: int) -> Any:
    import faiss

    size, width = gallery_GD.shape
    flat: Any = faiss.IndexFlatIP(width)
    if kind == "flat":
        return flat
    if kind == "hnsw":
        index: Any = faiss.IndexHNSWFlat(width, LINKS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = 200
        index.hnsw.efSearch = 256
        return index
    nlist = settings.nlist or max(1, min(int(4 * size**0.5), size // ENOUGH))
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


def _sample(gallery_GD: Any, kind: Kind, nlist: int, settings: IndexSettings, seed: int) -> Floats:
    """Vectors to train on, in the gallery's order."""
    codes = ENOUGH * 2**settings.nbits if kind == "ivf_pq" else 0
    wanted = min(settings.training_size or max(64 * nlist, codes), len(gallery_GD))
    least = max(nlist, 2**settings.nbits if kind == "ivf_pq" else 0)
    if wanted < least:
        raise UserError(
            f"index.training_size {wanted} must be at least {least}, the lists or the codes of a"
            " part."
        )
    rows = np.sort(np.random.default_rng(seed).permutation(len(gallery_GD))[:wanted])
    return np.ascontiguousarray(gallery_GD[rows], np.float32)


def recall(
    queries_QD: Any, gallery_GD: Any, rows_QK: Rows, seed: int, excluded_QE: Rows | None = None
) -> float:
    """The share of the exact best images that `rows_QK` holds, over at most 200 queries."""
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


def kmeans(vectors_ND: Any, num_clusters: int, seed: int) -> tuple[Rows, Floats]:
    """The cluster (N,) of each unit vector and the unit centroids (C, D), by spherical k-means."""
    import faiss

    vectors_ND = np.ascontiguousarray(vectors_ND, np.float32)
    num = min(num_clusters, len(vectors_ND))
    found = faiss.Kmeans(
        vectors_ND.shape[1], num, seed=seed % 2**31, spherical=True, min_points_per_centroid=1
    )
    found.train(vectors_ND)
    return np.asarray(found.index.search(vectors_ND, 1)[1][:, 0], np.int64), np.asarray(
        found.centroids
    )
