"""Each query's best images, and the places of given ones, over vectors of any size on disk. Never a whole Q x G matrix.

Vectors are float16 or float32 arrays, memory-mapped ones too, read shard by shard. A score is a dot product in float32.
A `device` is torch's name of one, or several with commas (`cuda:0,cuda:1`), which take a shard each.
Both functions are exact: a fast product (bfloat16 where the processor has it, else float32) says which images are in
question, a bound on its rounding says that no other is, and those in question are scored in float32, each by itself, so
that equal vectors have equal scores. Ties by gallery row. Galleries of several vectors an image: `several.py`.

Q queries, G gallery, K kept, D dimensions, B queries of a block, N gallery rows of a shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from cirloop.retrieval import several
from cirloop.retrieval.blocks import BLOCK_NUMBERS, Floats, Rows, first, shard_size, tensor

Made = TypeVar("Made")
SLACK = 24
"""Images in question beyond 5/4 of those asked for, before a query is looked at more closely."""


def best_rows(queries_QD: Any, gallery_GD: Any, k: int, device: str = "cpu") -> tuple[Rows, Floats]:
    """Gallery rows (Q, K) of each query's `k` best images and their scores, best first, ties by row; K <= G."""
    k = min(k, len(gallery_GD))
    if gallery_GD.ndim == 3:
        return several.best_rows(queries_QD, gallery_GD, k, first(device))

    def search(shard: _Shard) -> tuple[Rows, Floats]:
        here = min(k, len(shard.vectors_ND))
        rows_QK, scores_QK = np.empty((len(queries_QD), here), np.int64), np.empty((len(queries_QD), here), np.float32)
        for block in shard.blocks(len(queries_QD)):
            rows_BK, scores_BK = shard.best(tensor(queries_QD[block], shard.device), here)
            rows_QK[block], scores_QK[block] = rows_BK.cpu(), scores_BK.cpu()
        return rows_QK, scores_QK

    return joined(_of_shards(search, gallery_GD, device), k)


def joined(parts: Iterable[tuple[Rows, Floats]], k: int) -> tuple[Rows, Floats]:
    """The `k` best of each query among those of parts of a gallery, best first, ties by row.

    Parts come in the order of their rows, which count through the whole gallery. What they found is put together
    exactly: an image among the `k` best of all is among those of its part.
    """
    rows_QK, scores_QK = np.zeros((0, 0), np.int64), np.zeros((0, 0), np.float32)
    for number, (rows_QM, scores_QM) in enumerate(parts):
        if number == 0:
            rows_QK, scores_QK = rows_QM[:, :k], scores_QM[:, :k]
            continue
        rows_QK, scores_QK = np.concatenate([rows_QK, rows_QM], 1), np.concatenate([scores_QK, scores_QM], 1)
        order_QK = np.argsort(-scores_QK, axis=1, kind="stable")[:, :k]  # stable: of tied images the earlier part's
        rows_QK, scores_QK = np.take_along_axis(rows_QK, order_QK, 1), np.take_along_axis(scores_QK, order_QK, 1)
    return rows_QK, scores_QK


def exact_scores(queries_QD: Any, gallery_GD: Any, rows_QM: Rows) -> Floats:
    """The scores (Q, M) of each query's rows, ascending within a query."""
    there, back = np.unique(rows_QM, return_inverse=True)
    at = torch.from_numpy(back.reshape(rows_QM.shape))
    return np.asarray(_exact(tensor(queries_QD, "cpu"), tensor(gallery_GD[there], "cpu"), at).numpy())


def pair_scores(queries_QD: Any, gallery_GD: Any, rows_Q: Rows, device: str = "cpu") -> Floats:
    """The score (Q,) of each query and its gallery row."""
    if gallery_GD.ndim == 3:
        return several.pair_scores(queries_QD, gallery_GD, rows_Q)
    device = first(device)
    score_Q = np.empty(len(rows_Q), np.float32)
    for start in range(0, len(rows_Q), 4096):
        block = slice(start, start + 4096)
        there, back = np.unique(rows_Q[block], return_inverse=True)
        own = torch.from_numpy(back.reshape(-1, 1)).to(device)
        gallery = tensor(gallery_GD[there], device)
        score_Q[block] = _exact(tensor(queries_QD[block], device), gallery, own)[:, 0].cpu()
    return score_Q


def places(queries_QD: Any, gallery_GD: Any, wanted_Q: Rows, device: str = "cpu") -> tuple[Rows, Floats]:
    """The place (Q,), from 1 among all images, of each query's wanted gallery row, and its score; ties by row."""
    if gallery_GD.ndim == 3:
        return several.places(queries_QD, gallery_GD, wanted_Q, first(device))
    score_Q = pair_scores(queries_QD, gallery_GD, wanted_Q, device)

    def count(shard: _Shard) -> Rows:
        count_Q = np.zeros(len(queries_QD), np.int64)
        for block in shard.blocks(len(queries_QD)):
            queries_BD = tensor(queries_QD[block], shard.device)
            score_B = torch.from_numpy(score_Q[block]).to(shard.device)
            row_B = torch.from_numpy(wanted_Q[block] - shard.start).to(shard.device)
            count_Q[block] = shard.above(queries_BD, score_B, row_B).cpu().numpy()
        return count_Q

    # In float32 throughout: bfloat16 would leave a twentieth of all images in question.
    counts = _of_shards(count, gallery_GD, device, torch.float32)
    return sum(counts, np.ones(len(queries_QD), np.int64)), score_Q


@dataclass(frozen=True, slots=True)
class _Shard:
    """Some rows of the gallery, and the same rounded for the fast product."""

    start: int
    vectors_ND: torch.Tensor
    coarse_ND: torch.Tensor
    norm: float
    error: float
    """Largest norm of a row, and of what rounding changed in one."""

    @classmethod
    def of(cls, start: int, vectors_ND: torch.Tensor, coarse: torch.dtype) -> _Shard:
        coarse_ND = vectors_ND.to(coarse)
        error = 0.0 if coarse == torch.float32 else float((vectors_ND - coarse_ND.float()).norm(dim=1).max())
        return cls(start, vectors_ND, coarse_ND, float(vectors_ND.norm(dim=1).max()), error)

    @property
    def device(self) -> str:
        return str(self.vectors_ND.device)

    def blocks(self, num_queries: int) -> Iterator[slice]:
        size = max(1, min(2048, BLOCK_NUMBERS // len(self.vectors_ND)))
        return (slice(start, min(start + size, num_queries)) for start in range(0, num_queries, size))

    def coarse(self, queries_BD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Approximate scores (B, N), and (B, 1) how far any of them may be off, beside 2^-8 of the score itself."""
        rounded = queries_BD.to(self.coarse_ND.dtype)
        off_B = (queries_BD - rounded.float()).norm(dim=1) * (self.norm + self.error)
        norm_B = queries_BD.norm(dim=1)
        sums = queries_BD.shape[1] * 2.0**-22 * norm_B * self.norm
        return rounded @ self.coarse_ND.T, (off_B + norm_B * self.error + sums)[:, None]

    @property
    def relative(self) -> float:
        """Rounding of the result itself, relative to it."""
        return 2.0**-8 if self.coarse_ND.dtype == torch.bfloat16 else 2.0**-22

    def best(self, queries_BD: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Gallery rows (B, k) and scores of the best of this shard."""
        scores_BN, off_B1 = self.coarse(queries_BD)
        num = min(k + k // 4 + SLACK, scores_BN.shape[1])
        values_BM, rows_BM = scores_BN.topk(num, dim=1, sorted=False)
        rows_BK, exact_BK = self._ordered(queries_BD, rows_BM.sort(dim=1).values, k)
        if num < scores_BN.shape[1]:
            cut_B = values_BM.amin(dim=1).float()
            unsure = (cut_B + cut_B.abs() * self.relative + off_B1[:, 0] >= exact_BK[:, -1]).nonzero()[:, 0]
            if len(unsure):
                rows_BK[unsure], exact_BK[unsure] = self._closely(queries_BD[unsure], k)
        return rows_BK + self.start, exact_BK

    def _ordered(self, queries_BD: torch.Tensor, rows_BM: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The k best of rows in ascending order, scored exactly; the sort is stable, so ties stay by row."""
        exact, order = _exact(queries_BD, self.vectors_ND, rows_BM).sort(dim=1, descending=True, stable=True)
        return rows_BM.gather(1, order)[:, :k].clone(), exact[:, :k].clone()

    def _closely(self, queries_BD: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same by float32 products, with every image that comes near the k-th: many where vectors are alike."""
        scores_BN = queries_BD @ self.vectors_ND.T
        off_B = queries_BD.shape[1] * 2.0**-22 * queries_BD.norm(dim=1) * self.norm + 1e-30
        edge_B = scores_BN.topk(k, dim=1, sorted=True).values[:, -1] - 2 * off_B
        found = [
            self._ordered(query[None], (row >= edge).nonzero().T, k)
            for query, row, edge in zip(queries_BD, scores_BN, edge_B, strict=True)
        ]
        return torch.cat([rows for rows, _ in found]), torch.cat([scores for _, scores in found])

    def above(self, queries_BD: torch.Tensor, score_B: torch.Tensor, row_B: torch.Tensor) -> torch.Tensor:
        """How many of this shard's images (B,) stand before one with this score and shard row."""
        scores_BN, off_B1 = self.coarse(queries_BD)
        off_B1 = off_B1 + (score_B.abs()[:, None] + off_B1) * 2 * self.relative
        low_B1, high_B1 = score_B[:, None] - off_B1, score_B[:, None] + off_B1
        count_B = (scores_BN > high_B1).sum(dim=1)
        near = ((scores_BN >= low_B1) & (scores_BN <= high_B1)).nonzero()
        if len(near):
            exact = _exact_pairs(queries_BD, self.vectors_ND, near)
            wanted = score_B[near[:, 0]]
            before = (exact > wanted) | ((exact == wanted) & (near[:, 1] < row_B[near[:, 0]]))
            count_B = count_B.index_add(0, near[:, 0], before.to(count_B.dtype))
        return count_B


def _of_shards(
    work: Callable[[_Shard], Made], gallery_GD: Any, device: str, coarse: torch.dtype | None = None
) -> Iterator[Made]:
    """What `work` makes of each shard, in their order: in turn, or on several devices as many at once."""
    devices = device.split(",")
    step = shard_size(gallery_GD)

    def made(start: int) -> Made:
        place = devices[start // step % len(devices)]
        vectors_ND = tensor(gallery_GD[start : start + step], place)
        return work(_Shard.of(start, vectors_ND, coarse or _fast_dtype(place)))

    starts = range(0, len(gallery_GD), step)
    if len(devices) == 1:
        yield from map(made, starts)
        return
    with ThreadPoolExecutor(len(devices)) as pool:
        yield from pool.map(made, starts)


def _fast_dtype(device: str) -> torch.dtype:
    """Bfloat16 where the processor multiplies such matrices in hardware."""
    fast = device == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    return torch.bfloat16 if fast else torch.float32


def _exact(queries_BD: torch.Tensor, gallery_ND: torch.Tensor, rows_BM: torch.Tensor) -> torch.Tensor:
    """Float32 scores (B, M) of given rows, each a dot product of its own; rows ascend within a query."""
    count, width = rows_BM.shape
    ends = torch.arange(0, count * width + 1, max(1, width), device=rows_BM.device)[: count + 1]
    return _sampled(queries_BD, gallery_ND, ends, rows_BM.reshape(-1)).view(count, width)


def _exact_pairs(queries_BD: torch.Tensor, gallery_ND: torch.Tensor, pairs_P2: torch.Tensor) -> torch.Tensor:
    """Float32 scores (P,) of (query, row) pairs sorted by both."""
    counts = torch.bincount(pairs_P2[:, 0], minlength=len(queries_BD))
    ends = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return _sampled(queries_BD, gallery_ND, ends, pairs_P2[:, 1])


def _sampled(
    queries_BD: torch.Tensor, gallery_ND: torch.Tensor, ends: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    size = (len(queries_BD), len(gallery_ND))
    empty = torch.zeros(len(columns), device=queries_BD.device)
    wanted = torch.sparse_csr_tensor(ends, columns, empty, size, check_invariants=False)
    made: torch.Tensor = torch.sparse.sampled_addmm(wanted, queries_BD, gallery_ND.T, beta=0.0).values()
    return made
