"""A part of the gallery that fits in memory, scored by a fast product and then exactly.

A fast product (bfloat16 where the processor has it, else float32) selects candidates, a bound on
its rounding shows that no other image can be among the best, and the candidates are scored in
float32, each by itself, so that equal vectors have equal scores.

Q queries, D dimensions, B queries of a block, N gallery rows of a part, V their vectors, C
candidates, K kept, W wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from cirloop.retrieval.arrays import Excluded, Vectors

Result = TypeVar("Result")
BLOCK_NUMBERS = 1 << 25
"""Scores, or numbers of a part of the gallery, in memory at once."""
SLACK = 24
"""Candidates beyond 5/4 of the images that are wanted, before a query's bound is computed."""


def first_device(device: str) -> str:
    """Return the first of several devices, which are named with commas between them."""
    return device.split(",")[0]


def part_size(gallery_GD: Vectors) -> int:
    """Return the number of gallery rows that are in memory at once."""
    return max(1, BLOCK_NUMBERS // int(np.prod(gallery_GD.shape[1:], dtype=np.int64)))


def tensor(vectors: npt.ArrayLike, device: str) -> torch.Tensor:
    """Convert to float32. Float32 vectors on the CPU are not copied: memory-mapped ones stay on
    the disk."""
    return torch.from_numpy(np.ascontiguousarray(vectors, np.float32)).to(device)


@dataclass(frozen=True, slots=True)
class GalleryPart:
    """Consecutive gallery rows and their rounded copy for the fast product. The vectors of an image
    follow one another."""

    start: int
    vectors_VD: torch.Tensor
    coarse_VD: torch.Tensor
    per_image: int
    norm: float
    """Largest norm of a vector."""
    error: float
    """Largest norm of the difference that rounding made to a vector."""

    @classmethod
    def of(cls, start: int, rows_ND: Vectors, device: str, coarse: torch.dtype) -> GalleryPart:
        """Load gallery rows onto a device; `start` is the first one's row in the gallery."""
        vectors_VD = tensor(rows_ND, device).reshape(-1, rows_ND.shape[-1])
        coarse_VD = vectors_VD.to(coarse)
        error = 0.0
        if coarse != torch.float32:
            error = float((vectors_VD - coarse_VD.float()).norm(dim=1).max())
        per_image = rows_ND.shape[1] if rows_ND.ndim == 3 else 1
        return cls(
            start, vectors_VD, coarse_VD, per_image, float(vectors_VD.norm(dim=1).max()), error
        )

    def __len__(self) -> int:
        return len(self.vectors_VD) // self.per_image

    @property
    def device(self) -> str:
        return str(self.vectors_VD.device)

    def blocks(self, num_queries: int) -> Iterator[slice]:
        """Split queries so that a block's scores fit in memory."""
        size = max(1, min(2048, BLOCK_NUMBERS // len(self.vectors_VD)))
        return (
            slice(start, min(start + size, num_queries)) for start in range(0, num_queries, size)
        )

    def approximate(
        self, queries_BD: torch.Tensor, excluded: Excluded
    ) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Return approximate scores (B, N), -inf for excluded rows, and the bounds of their error:
        absolute (B, 1) and relative."""
        rounded = queries_BD.to(self.coarse_VD.dtype)
        off_B = (queries_BD - rounded.float()).norm(dim=1) * (self.norm + self.error)
        norm_B = queries_BD.norm(dim=1)
        sums = queries_BD.shape[1] * 2.0**-22 * norm_B * self.norm
        scores_BN = rounded @ self.coarse_VD.T
        if self.per_image > 1:
            scores_BN = scores_BN.view(len(queries_BD), -1, self.per_image).amax(2)
        if excluded is not None:
            queries = np.repeat(np.arange(len(excluded)), [len(rows) for rows in excluded])
            rows = np.concatenate([*excluded]) - self.start
            in_part = (rows >= 0) & (rows < len(self))
            scores_BN[
                torch.from_numpy(queries[in_part]), torch.from_numpy(rows[in_part])
            ] = -torch.inf
        relative = 2.0**-8 if self.coarse_VD.dtype == torch.bfloat16 else 2.0**-22
        return scores_BN, (off_B + norm_B * self.error + sums)[:, None], relative

    def topk(
        self, queries_BD: torch.Tensor, k: int, excluded: Excluded
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gallery rows (B, k) and scores of the best images of this part."""
        scores_BN, off_B1, relative = self.approximate(queries_BD, excluded)
        num = min(k + k // 4 + SLACK, scores_BN.shape[1])
        values_BC, candidates_BC = scores_BN.topk(num, dim=1, sorted=False)
        cut_B = values_BC.amin(dim=1).float()
        rows_BK, exact_BK = self._ordered(
            queries_BD, scores_BN, candidates_BC.sort(dim=1).values, k
        )
        if num < scores_BN.shape[1]:  # a cut of -inf gives no number here, and nothing is unsure
            unsure_B = cut_B + cut_B.abs() * relative + off_B1[:, 0] >= exact_BK[:, -1]
            for b in unsure_B.nonzero()[:, 0].tolist():
                highest_N = scores_BN[b].float() + scores_BN[b].abs().float() * relative + off_B1[b]
                candidates_1C = (highest_N >= exact_BK[b, -1]).nonzero().T
                query = slice(b, b + 1)
                rows_BK[query], exact_BK[query] = self._ordered(
                    queries_BD[query], scores_BN[query], candidates_1C, k
                )
        return rows_BK + self.start, exact_BK

    def _ordered(
        self, queries_BD: torch.Tensor, scores_BN: torch.Tensor, rows_BC: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the k best of `rows_BC`, scored exactly. Rows ascend and the sort is stable, so
        that ties are by row."""
        query_C = torch.arange(len(rows_BC), device=rows_BC.device).repeat_interleave(
            rows_BC.shape[1]
        )
        exact_BC = self.exact(queries_BD, query_C, rows_BC.reshape(-1)).view(rows_BC.shape)
        exact_BC = exact_BC.masked_fill(scores_BN.gather(1, rows_BC).isneginf(), -torch.inf)
        sorted_BC, order = exact_BC.sort(dim=1, descending=True, stable=True)
        return rows_BC.gather(1, order)[:, :k].clone(), sorted_BC[:, :k].clone()

    def count_above(
        self,
        queries_BD: torch.Tensor,
        score_BW: torch.Tensor,
        row_BW: torch.Tensor,
        excluded: Excluded,
    ) -> torch.Tensor:
        """Count the images of this part (B, W) ranked before images with these scores and rows of
        the part."""
        scores_BN, off_B1, relative = self.approximate(queries_BD, excluded)
        counts_BW = torch.empty_like(row_BW)
        for w, (score_B, row_B) in enumerate(zip(score_BW.T, row_BW.T, strict=True)):
            reach_B1 = off_B1 + (score_B.abs()[:, None] + off_B1) * 2 * relative
            low_B1 = score_B[:, None] - reach_B1
            high_B1 = score_B[:, None] + reach_B1
            count_B = (scores_BN > high_B1).sum(dim=1)
            query_C, row_C = ((scores_BN >= low_B1) & (scores_BN <= high_B1)).nonzero().T
            exact_C = self.exact(queries_BD, query_C, row_C)
            before_C = (exact_C > score_B[query_C]) | (
                (exact_C == score_B[query_C]) & (row_C < row_B[query_C])
            )
            counts_BW[:, w] = count_B.index_add(0, query_C, before_C.to(count_B.dtype))
        return counts_BW

    def exact(
        self, queries_BD: torch.Tensor, query_C: torch.Tensor, row_C: torch.Tensor
    ) -> torch.Tensor:
        """Compute float32 scores (C,) of different (query, row) pairs sorted by both, each a dot
        product of its own."""
        if not len(row_C):
            return torch.zeros(0, device=row_C.device)
        if self.per_image > 1:
            row_C = (
                row_C[:, None] * self.per_image + torch.arange(self.per_image, device=row_C.device)
            ).reshape(-1)
            query_C = query_C.repeat_interleave(self.per_image)
        counts = torch.bincount(query_C, minlength=len(queries_BD))
        ends = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        size = (len(queries_BD), len(self.vectors_VD))
        empty = torch.zeros(len(row_C), device=row_C.device)
        pairs = torch.sparse_csr_tensor(ends, row_C, empty, size, check_invariants=False)
        scores: torch.Tensor = torch.sparse.sampled_addmm(
            pairs, queries_BD, self.vectors_VD.T, beta=0.0
        ).values()
        return scores.view(-1, self.per_image).amax(1) if self.per_image > 1 else scores


def map_parts(
    work: Callable[[GalleryPart], Result],
    gallery_GD: Vectors,
    device: str,
    coarse: torch.dtype | None = None,
) -> Iterator[Result]:
    """Yield the result of `work` for each part, in their order; several devices work at once."""
    devices = device.split(",")
    step = part_size(gallery_GD)

    def result(start: int) -> Result:
        name = devices[start // step % len(devices)]
        rows_ND = gallery_GD[start : start + step]
        return work(GalleryPart.of(start, rows_ND, name, coarse or _fast_dtype(name)))

    starts = range(0, len(gallery_GD), step)
    if len(devices) == 1:
        yield from map(result, starts)
        return
    with ThreadPoolExecutor(len(devices)) as pool:
        yield from pool.map(result, starts)


def _fast_dtype(device: str) -> torch.dtype:
    """Return bfloat16 where the processor multiplies such matrices in hardware, else float32."""
    fast = device == "cpu" and (
        torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    )
    return torch.bfloat16 if fast else torch.float32
