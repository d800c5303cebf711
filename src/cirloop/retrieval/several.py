"""Best images, places and scores where an image has several vectors (G, M, D), of which the most similar one counts.

All scores of a block of queries by float32 products, block after block: no bound on a coarser product is worth its
code for galleries of M vectors an image. Letters as in `top.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cirloop.retrieval.blocks import Floats, Rows, score_blocks
from cirloop.retrieval.search import best_columns


def best_rows(queries_QD: Any, gallery_GMD: Any, k: int, device: str) -> tuple[Rows, Floats]:
    rows_QK, scores_QK = np.zeros((len(queries_QD), k), np.int64), np.zeros((len(queries_QD), k), np.float32)
    for numbers, scores_BG in score_blocks(queries_QD, gallery_GMD, np.arange(len(queries_QD)), device):
        best_BK = best_columns(scores_BG, k)
        rows_QK[numbers], scores_QK[numbers] = best_BK, np.take_along_axis(scores_BG, best_BK, 1)
    return rows_QK, scores_QK


def pair_scores(queries_QD: Any, gallery_GMD: Any, rows_Q: Rows) -> Floats:
    score_Q = np.empty(len(rows_Q), np.float32)
    for start in range(0, len(rows_Q), 512):
        block = slice(start, start + 512)
        images_BMD = np.asarray(gallery_GMD[rows_Q[block]], np.float32)
        score_Q[block] = np.einsum("bd,bmd->bm", np.asarray(queries_QD[block], np.float32), images_BMD).max(1)
    return score_Q


def places(queries_QD: Any, gallery_GMD: Any, wanted_Q: Rows, device: str) -> tuple[Rows, Floats]:
    place_Q, score_Q = np.empty(len(wanted_Q), np.int64), np.empty(len(wanted_Q), np.float32)
    for numbers, scores_BG in score_blocks(queries_QD, gallery_GMD, np.arange(len(queries_QD)), device):
        wanted_B1 = wanted_Q[numbers][:, None]
        score_B1 = np.take_along_axis(scores_BG, wanted_B1, 1)
        before = (scores_BG > score_B1) | ((scores_BG == score_B1) & (np.arange(scores_BG.shape[1]) < wanted_B1))
        place_Q[numbers], score_Q[numbers] = before.sum(1) + 1, score_B1[:, 0]
    return place_Q, score_Q
