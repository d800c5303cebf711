"""`knn_text` for samples of an image and a text each: negatives that look alike and read otherwise.

Among a sample's k nearest others in looks, at or above a similarity floor, the nearest of those
whose text is usable and less similar than a threshold; where it lets none through it is raised by
0.09, twice. Beside these *hard* negatives stand *diverse* ones, from the visually farthest cluster
and under the same thresholds. Similarities are dot products of vectors of unit norm.

Degenerate cases: where nothing is at or above the floor, or every text is at or above the last
threshold, there is no hard negative. One cluster has no farthest one, so there are no diverse ones.

N samples, B of them a block, V images, T texts, C clusters, K neighbours, D and E dimensions of
images and texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from cirloop.negatives.strategies.knn_text import RAISES, thresholds
from cirloop.retrieval.arrays import Floats, Mask, Rows

Progress = Callable[[Sequence[int]], Iterable[int]]
BLOCK = 8192
"""Samples whose neighbours are searched between two steps of the progress bar."""
DRAWN = 64
"""Members of a cluster that are compared at once."""
HARD = "hard"
DIVERSE = "diverse"


class RejectReason(IntEnum):
    """Why a neighbour is no candidate; 0 to 2 are candidates, at the first, second or third
    threshold."""

    TEXT_NEAR = RAISES
    GENERIC = 4
    SAME_TEXT = 5
    BELOW_FLOOR = 6
    ABSENT = 7


@dataclass(frozen=True, slots=True)
class SamplePool:
    """Samples, each an image and a text, and the vectors of both.

    Samples of one image, or of one group, are never each other's negatives. A text may be used as a
    negative `max_uses_T` times, 0 for a generic one; a `short_T` one only where no longer text is
    found.
    """

    visual_VD: Floats
    image_of_N: Rows
    texts_TE: Floats
    text_of_N: Rows
    group_of_N: Rows
    max_uses_T: Rows
    short_T: Mask

    def __len__(self) -> int:
        return len(self.image_of_N)

    def related(self, i: int, rows: Rows) -> Mask:
        """Return which of `rows` share the image, the group or the text of sample i."""
        same_image = self.image_of_N[rows] == self.image_of_N[i]
        same_group = self.group_of_N[rows] == self.group_of_N[i]
        same_text = self.text_of_N[rows] == self.text_of_N[i]
        return np.asarray(same_image | same_group | same_text)


@dataclass(frozen=True, slots=True)
class KnnTextParams:
    """Parameters of the selection; docs/add_hard_negatives.md explains each."""

    k_nn: int = 30
    cosine_threshold: float = 0.3
    min_visual_similarity: float = 0.3
    diverse_ratio: float = 0.3
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The k nearest others in looks, best first, ties by row; -1 where there are fewer. `codes_NK`
    as above."""

    rows_NK: Rows
    visual_NK: Floats
    text_NK: Floats
    codes_NK: npt.NDArray[np.int8]


@dataclass(frozen=True, slots=True)
class Negative:
    """The negative of a sample: sample `row`, of `kind`, below threshold number `level`."""

    row: int
    kind: str
    level: int
    visual: float
    text: float


@dataclass(frozen=True, slots=True)
class Clusters:
    """Visual clusters: each image's, and their centroids."""

    of_V: Rows
    centroids_CD: Floats

    @classmethod
    def of_images(cls, visual_VD: Floats, num: int, seed: int) -> Clusters:
        """Make at most `num` clusters without empty ones, deterministic by vectors and seed."""
        from cirloop.retrieval.ann import kmeans

        label_V, centroids_CD = kmeans(visual_VD, num, seed)
        kept, of_V = np.unique(label_V, return_inverse=True)
        return cls(of_V.astype(np.int64), centroids_CD[kept])

    def farthest(self) -> Rows:
        """Return each cluster's farthest other one by Euclidean distance of the centroids, ties by
        number; -1 for a single cluster."""
        squared = (self.centroids_CD**2).sum(axis=1)
        distances = (
            squared[:, None] + squared[None, :] - 2 * self.centroids_CD @ self.centroids_CD.T
        )
        np.fill_diagonal(distances, -np.inf)
        return np.argmax(distances, axis=1) if len(distances) > 1 else np.full(len(distances), -1)


def neighbours(
    pool: SamplePool, params: KnnTextParams, device: str = "cpu", progress: Progress = iter
) -> Neighbours:
    """Search each sample's neighbours, block by block, and grade each (`codes_NK`)."""
    from cirloop.retrieval.topk import scores_of, topk

    num = len(pool)
    k = min(params.k_nn, max(1, len(pool) - 1))
    rows_NK = np.empty((num, k), np.int64)
    visual_NK = np.empty((num, k), np.float32)
    text_NK = np.empty((num, k), np.float32)
    vectors_ND = pool.visual_VD[pool.image_of_N]
    of_image = _members(pool.image_of_N)
    of_group = _members(pool.group_of_N)
    for start in progress(range(0, num, BLOCK)):
        block = slice(start, start + BLOCK)
        excluded = [
            np.concatenate(rows) for rows in zip(of_image[block], of_group[block], strict=True)
        ]
        rows_NK[block], visual_NK[block] = topk(vectors_ND[block], vectors_ND, k, device, excluded)
        texts_BK = pool.text_of_N[rows_NK[block]]
        text_NK[block] = scores_of(
            pool.texts_TE[pool.text_of_N[block]], pool.texts_TE, texts_BK, device
        )
    return Neighbours(
        rows_NK, visual_NK, text_NK, _codes(pool, params, rows_NK, visual_NK, text_NK)
    )


def _members(keys_N: Rows) -> list[Rows]:
    """Return for each sample all that share its key, itself too; these share one array."""
    _, label_N = np.unique(keys_N, return_inverse=True)
    members = np.split(np.argsort(label_N, kind="stable"), np.cumsum(np.bincount(label_N))[:-1])
    return [members[label] for label in label_N]


def _codes(
    pool: SamplePool, params: KnnTextParams, rows_NK: Rows, visual_NK: Floats, text_NK: Floats
) -> npt.NDArray[np.int8]:
    texts_NK = pool.text_of_N[rows_NK]
    codes = np.zeros(rows_NK.shape, np.int8)
    for threshold in thresholds(params.cosine_threshold):
        codes += text_NK >= threshold
    codes[pool.max_uses_T[texts_NK] == 0] = RejectReason.GENERIC
    codes[texts_NK == pool.text_of_N[:, None]] = RejectReason.SAME_TEXT
    codes[visual_NK < np.float32(params.min_visual_similarity)] = RejectReason.BELOW_FLOOR
    codes[rows_NK < 0] = RejectReason.ABSENT
    return codes


class _Selector:
    """Selector of negatives in the samples' order, since each choice is a use of its text."""

    def __init__(
        self, pool: SamplePool, near: Neighbours, clusters: Clusters, params: KnnTextParams
    ) -> None:
        self._pool = pool
        self._near = near
        self._params = params
        self._levels = thresholds(params.cosine_threshold)
        self._remaining_uses_T = pool.max_uses_T.copy()
        self._cluster_of_N = clusters.of_V[pool.image_of_N]
        self._far = [np.flatnonzero(self._cluster_of_N == far) for far in clusters.farthest()]
        self.num_exhausted = 0
        """Candidates that were skipped because their text was used up."""
        short_NK = pool.short_T[pool.text_of_N[near.rows_NK]]
        keys = np.where(
            near.codes_NK < RAISES, near.codes_NK + RAISES * short_NK, 2 * RAISES
        ).astype(np.int8)
        order_NK = np.argsort(keys, axis=1, kind="stable")
        self._order_NK = order_NK.astype(np.int16 if near.rows_NK.shape[1] < 1 << 15 else np.int32)
        self._num_long_N = (keys < RAISES).sum(1)
        self._num_N = (keys < 2 * RAISES).sum(1)

    def choose(self, i: int, *, diverse_first: bool) -> Negative | None:
        """Try long texts of the first kind, of the other, then short texts of both; None where none
        fits."""
        kinds = (self._diverse, self._hard) if diverse_first else (self._hard, self._diverse)
        for short in (False, True):
            for kind in kinds:
                negative = kind(i, short=short)
                if negative is not None:
                    self._remaining_uses_T[self._pool.text_of_N[negative.row]] -= 1
                    return negative
        return None

    def _hard(self, i: int, *, short: bool) -> Negative | None:
        """Return the visually nearest of those below the lowest threshold that any passes."""
        near = self._near
        long = self._num_long_N[i]
        for place in (
            self._order_NK[i, long : self._num_N[i]] if short else self._order_NK[i, :long]
        ):
            row = near.rows_NK[i, place]
            if self._remaining_uses_T[self._pool.text_of_N[row]] > 0:
                visual = near.visual_NK[i, place]
                text = near.text_NK[i, place]
                return Negative(
                    int(row), HARD, int(near.codes_NK[i, place]), float(visual), float(text)
                )
            self.num_exhausted += 1
        return None

    def _diverse(self, i: int, *, short: bool) -> Negative | None:
        """Return the first, in an order drawn for this sample, below the lowest threshold that any
        passes."""
        pool = self._pool
        members = self._far[self._cluster_of_N[i]]
        mine_E = pool.texts_TE[pool.text_of_N[i]]
        best = (RAISES, -1, 0.0)
        drawn = members[np.random.default_rng([self._params.seed, 2, i]).permutation(len(members))]
        for start in range(0, len(drawn), DRAWN):
            rows = drawn[start : start + DRAWN]
            texts = pool.text_of_N[rows]
            scores = pool.texts_TE[texts] @ mine_E
            levels = (scores[:, None] >= self._levels).sum(axis=1)
            levels[
                (self._remaining_uses_T[texts] <= 0)
                | (pool.short_T[texts] != short)
                | pool.related(i, rows)
            ] = RAISES
            at = int(np.argmin(levels))
            if levels[at] < best[0]:
                best = (int(levels[at]), int(rows[at]), float(scores[at]))
            if best[0] == 0:
                break
        level, row, text = best
        if row < 0:
            return None
        visual = pool.visual_VD[pool.image_of_N[row]] @ pool.visual_VD[pool.image_of_N[i]]
        return Negative(row, DIVERSE, level, float(visual), text)


def diverse_first(num: int, params: KnnTextParams) -> Mask:
    """Draw which samples try a diverse negative first: a share of `diverse_ratio`."""
    return np.random.default_rng([params.seed, 1]).random(num) < params.diverse_ratio


def choose(
    pool: SamplePool,
    near: Neighbours,
    clusters: Clusters,
    params: KnnTextParams,
    progress: Progress = iter,
) -> tuple[list[Negative | None], int]:
    """Choose each sample's negative, and count the candidates whose text was used up.

    In the samples' order. Hard or diverse is tried first, as drawn; then the other kind; then both
    again with short texts. None where no kind has a candidate.
    """
    first = diverse_first(len(pool), params)
    selector = _Selector(pool, near, clusters, params)
    chosen = []
    for start in progress(range(0, len(pool), 1024)):
        for i in range(start, min(start + 1024, len(pool))):
            chosen.append(selector.choose(i, diverse_first=bool(first[i])))
    return chosen, selector.num_exhausted
