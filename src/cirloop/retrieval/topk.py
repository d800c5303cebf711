"""Each query's best images, and the ranks of given ones, over vectors of any size on disk. Never a
whole Q x G matrix.

Vectors are float16 or float32 arrays, memory-mapped ones too, read part by part. A score is a dot
product in float32; where an image has several vectors (G, M, D), its most similar one counts. A
`device` is torch's name of one, or several with commas (`cuda:0,cuda:1`), which take a part each.

`topk` and `ranks` are exact: a fast product (bfloat16 where the processor has it, else float32)
says which images are in question, a bound on its rounding says that no other is, and those in
question are scored in float32, each by itself, so that equal vectors have equal scores. Ties by
gallery row.

Q queries, G gallery, K kept, W wanted, D dimensions, B queries of a block, N gallery rows of a
part, C candidates.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from cirloop.backbones.similarity import similarity

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]
Result = TypeVar("Result")
BLOCK_NUMBERS = 1 << 25
"""Scores, or numbers of a part of the gallery, in memory at once."""
SLACK = 24
"""Candidates beyond 5/4 of those asked for, before a query is looked at more closely."""
# For the whole process and not around the call: filters that threads set and put back would get
# mixed up.
warnings.filterwarnings(
    "ignore", "The given NumPy array is not writable"
)  # memory-mapped vectors are only read
warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")


def topk(
    queries_QD: Any, gallery_GD: Any, k: int, device: str = "cpu", excluded: Any = None
) -> tuple[Rows, Floats]:
    """Gallery rows (Q, K) of each query's `k` best images and their scores, best first, ties by
    row; K <= G.

    `excluded`, sliced by queries, gives an array of gallery rows for each that are not ranked; -1
    is no row. Where too few images are left, rows are -1 and scores -inf.
    """
    k = min(k, len(gallery_GD))

    def search(part: _Part) -> tuple[Rows, Floats]:
        here = min(k, len(part))
        rows_QK = np.empty((len(queries_QD), here), np.int64)
        scores_QK = np.empty((len(queries_QD), here), np.float32)
        for block in part.blocks(len(queries_QD)):
            found = part.topk(
                tensor(queries_QD[block], part.device), here, _rows_of(excluded, block)
            )
            rows_QK[block], scores_QK[block] = (array.cpu().numpy() for array in found)
        return rows_QK, scores_QK

    rows_QK, scores_QK = merge_topk(_of_parts(search, gallery_GD, device), k)
    rows_QK[np.isneginf(scores_QK)] = -1
    return rows_QK, scores_QK


def ranks(
    queries_QD: Any, gallery_GD: Any, wanted_QW: Rows, device: str = "cpu", excluded: Any = None
) -> tuple[Rows, Floats]:
    """The rank (Q, W), from 1, of each query's wanted gallery rows and their scores, ties by row.

    `excluded` as in `topk`. What is said of a wanted row -1 means nothing.
    """
    score_QW = scores_of(queries_QD, gallery_GD, np.maximum(wanted_QW, 0), device)

    def count(part: _Part) -> Rows:
        count_QW = np.zeros(wanted_QW.shape, np.int64)
        for block in part.blocks(len(queries_QD)):
            queries_BD = tensor(queries_QD[block], part.device)
            score_BW = torch.from_numpy(score_QW[block]).to(part.device)
            row_BW = torch.from_numpy(wanted_QW[block] - part.start).to(part.device)
            count_QW[block] = (
                part.count_above(queries_BD, score_BW, row_BW, _rows_of(excluded, block))
                .cpu()
                .numpy()
            )
        return count_QW

    # In float32 throughout: bfloat16 would leave a twentieth of all images in question.
    counts = _of_parts(count, gallery_GD, device, torch.float32)
    return sum(counts, np.ones(wanted_QW.shape, np.int64)), score_QW


def scores_of(queries_QD: Any, gallery_GD: Any, rows_QW: Rows, device: str = "cpu") -> Floats:
    """The scores (Q, W) of given gallery rows of each query, those that `topk` and `ranks` give
    them."""
    device = first_device(device)
    score_QW = np.empty(rows_QW.shape, np.float32)
    if not rows_QW.size:
        return score_QW
    numbers = max(1, rows_QW.shape[1] * int(np.prod(gallery_GD.shape[1:], dtype=np.int64)))
    size = max(1, min(4096, BLOCK_NUMBERS // numbers))
    for start in range(0, len(rows_QW), size):
        block = slice(start, start + size)
        there, back = np.unique(rows_QW[block], return_inverse=True)
        back_BW = back.reshape(rows_QW[block].shape)
        pairs, places = np.unique(
            np.arange(len(back_BW))[:, None] * len(there) + back_BW, return_inverse=True
        )
        part = _Part.of(0, gallery_GD[there], device, torch.float32)
        query_C, row_C = (
            torch.from_numpy(each).to(device) for each in np.divmod(pairs, len(there))
        )
        exact_C = part.exact(tensor(queries_QD[block], device), query_C, row_C).cpu().numpy()
        score_QW[block] = exact_C[places.reshape(back_BW.shape)]
    return score_QW


def score_blocks(
    queries_QD: Any, gallery_GD: Any, device: str = "cpu"
) -> Iterator[tuple[slice, Floats]]:
    """Float32 scores (B, G) of all queries, block by block, each with the place of its queries."""
    device = first_device(device)
    step = part_size(gallery_GD)
    each = int(np.prod(gallery_GD.shape[1:-1], dtype=np.int64))  # vectors of an image
    size = max(1, min(1024, BLOCK_NUMBERS // max(1, len(gallery_GD) * each)))
    held = (
        tensor(gallery_GD, device) if len(gallery_GD) <= step else None
    )  # a small gallery is converted once
    for start in range(0, len(queries_QD), size):
        block = slice(start, min(start + size, len(queries_QD)))
        queries = tensor(queries_QD[block], device)
        if held is not None:
            yield block, similarity(queries, held).cpu().numpy()
            continue
        scores_BG = np.empty((len(queries), len(gallery_GD)), np.float32)
        for at in range(0, len(gallery_GD), step):
            scores = similarity(queries, tensor(gallery_GD[at : at + step], device))
            scores_BG[:, at : at + step] = scores.cpu().numpy()
        yield block, scores_BG


def merge_topk(parts: Iterable[tuple[Rows, Floats]], k: int) -> tuple[Rows, Floats]:
    """The `k` best of each query among those of parts of a gallery, best first, ties by row.

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
        order_QK = np.argsort(-scores_QK, axis=1, kind="stable")[
            :, :k
        ]  # stable: of tied images the earlier part's
        rows_QK = np.take_along_axis(rows_QK, order_QK, 1)
        scores_QK = np.take_along_axis(scores_QK, order_QK, 1)
    return rows_QK, scores_QK


def first_device(device: str) -> str:
    """Of several devices, named with commas between them, the one for what is not shared out."""
    return device.split(",")[0]


def part_size(gallery_GD: Any) -> int:
    """Rows of a gallery that are in memory at once."""
    return max(1, BLOCK_NUMBERS // int(np.prod(gallery_GD.shape[1:], dtype=np.int64)))


def tensor(vectors: Any, device: str) -> torch.Tensor:
    """Float32, on the CPU without a copy where they are that already: memory-mapped ones then stay
    on the disk."""
    return torch.from_numpy(np.ascontiguousarray(vectors, np.float32)).to(device)


@dataclass(frozen=True, slots=True)
class _Part:
    """Some rows of the gallery, and the same rounded for the fast product. The vectors of an image
    are in a row."""

    start: int
    vectors_VD: torch.Tensor
    coarse_VD: torch.Tensor
    per_image: int
    norm: float
    error: float
    """Largest norm of a vector, and of what rounding changed in one."""

    @classmethod
    def of(cls, start: int, rows_ND: Any, device: str, coarse: torch.dtype) -> _Part:
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
        size = max(1, min(2048, BLOCK_NUMBERS // len(self.vectors_VD)))
        return (
            slice(start, min(start + size, num_queries)) for start in range(0, num_queries, size)
        )

    def approximate(
        self, queries_BD: torch.Tensor, excluded: Sequence[Rows] | None
    ) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Approximate scores (B, N), -inf for excluded rows, and how far any may be off: (B, 1),
        and relative to it."""
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
            here = (rows >= 0) & (rows < len(self))
            scores_BN[torch.from_numpy(queries[here]), torch.from_numpy(rows[here])] = -torch.inf
        relative = 2.0**-8 if self.coarse_VD.dtype == torch.bfloat16 else 2.0**-22
        return scores_BN, (off_B + norm_B * self.error + sums)[:, None], relative

    def topk(
        self, queries_BD: torch.Tensor, k: int, excluded: Sequence[Rows] | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gallery rows (B, k) and scores of the best of this part."""
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
                one = slice(b, b + 1)
                rows_BK[one], exact_BK[one] = self._ordered(
                    queries_BD[one], scores_BN[one], candidates_1C, k
                )
        return rows_BK + self.start, exact_BK

    def _ordered(
        self, queries_BD: torch.Tensor, scores_BN: torch.Tensor, rows_BC: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The k best of rows in ascending order, scored exactly; the sort is stable, so ties stay
        by row."""
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
        excluded: Sequence[Rows] | None,
    ) -> torch.Tensor:
        """How many of this part's images (B, W) stand before ones with these scores and rows of the
        part."""
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
        """Float32 scores (C,) of different (query, row) pairs sorted by both, each a dot product of
        its own."""
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


def _of_parts(
    work: Callable[[_Part], Result], gallery_GD: Any, device: str, coarse: torch.dtype | None = None
) -> Iterator[Result]:
    """What `work` makes of each part, in their order: in turn, or on several devices as many at
    once."""
    devices = device.split(",")
    step = part_size(gallery_GD)

    def result(start: int) -> Result:
        place = devices[start // step % len(devices)]
        return work(
            _Part.of(start, gallery_GD[start : start + step], place, coarse or _fast_dtype(place))
        )

    starts = range(0, len(gallery_GD), step)
    if len(devices) == 1:
        yield from map(result, starts)
        return
    with ThreadPoolExecutor(len(devices)) as pool:
        yield from pool.map(result, starts)


def _fast_dtype(device: str) -> torch.dtype:
    """Bfloat16 where the processor multiplies such matrices in hardware."""
    fast = device == "cpu" and (
        torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    )
    return torch.bfloat16 if fast else torch.float32


def _rows_of(excluded: Any, block: slice) -> Sequence[Rows] | None:
    return None if excluded is None else excluded[block]
