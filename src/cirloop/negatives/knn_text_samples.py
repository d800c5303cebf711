"""`knn_text` for samples of an image and a text each: negatives that look alike and read otherwise.

Among a sample's k nearest others in looks, at or above a similarity floor, the nearest of those whose text is usable
and less similar than a threshold; where it lets none through it is raised by 0.09, twice. Beside these *hard* negatives
stand *diverse* ones, from the visually farthest cluster and under the same thresholds. Similarities are dot products of
vectors of unit norm.

Degenerate cases: where nothing is at or above the floor, or every text is at or above the last threshold, there is no
hard negative. One cluster has no farthest one, so there are no diverse ones.

N samples, B of them a block, V images, T texts, C clusters, K neighbours, D and E dimensions of images and texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cirloop.negatives.base import Floats, Mask, Rows, best_of
from cirloop.negatives.knn_text import RAISES, thresholds

Small = npt.NDArray[np.int8]
Progress = Callable[[Sequence[int]], Iterable[int]]
BLOCK_NUMBERS, BLOCK_SAMPLES = 1 << 22, 32
"""Scores of a block in memory: 16 MiB, which stay in the cache; more where that is fewer samples than these."""
DRAWN = 64
"""Members of a cluster looked at at once."""
NEAR, GENERIC, SAME, LOW, ABSENT = 3, 4, 5, 6, 7
"""Why a neighbour is no candidate: text too near, text generic, the sample's own text, below the floor, not there.
0 to 2 are candidates, at the first, second or third threshold."""
HARD, DIVERSE = "hard", "diverse"


@dataclass(frozen=True, slots=True)
class Pool:
    """Samples, each an image and a text, and the vectors of both.

    Samples of one image, or of one group, are never each other's negatives. A text may be used as a negative `uses_T`
    times, 0 for a generic one; a `short_T` one only where no longer text is found.
    """

    visual_VD: Floats
    image_of_N: Rows
    texts_TE: Floats
    text_of_N: Rows
    group_of_N: Rows
    uses_T: Rows
    short_T: Mask

    def __len__(self) -> int:
        return len(self.image_of_N)

    def barred(self, i: int, rows: Rows) -> Mask:
        """Which of `rows` are of the image, the group or the text of sample i."""
        mine = (self.image_of_N[i], self.group_of_N[i], self.text_of_N[i])
        all_of = (self.image_of_N, self.group_of_N, self.text_of_N)
        found: Mask = np.logical_or.reduce([values[rows] == value for values, value in zip(all_of, mine, strict=True)])
        return found


@dataclass(frozen=True, slots=True)
class Rule:
    """The numbers that decide; docs/add_hard_negatives.md says what each means."""

    k_nn: int = 30
    cosine_threshold: float = 0.3
    min_visual_similarity: float = 0.3
    diverse_ratio: float = 0.3
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The k nearest others in looks, best first, ties by row; -1 where there are fewer. `codes_NK` as above."""

    rows_NK: Rows
    visual_NK: Floats
    text_NK: Floats
    codes_NK: Small


@dataclass(frozen=True, slots=True)
class Negative:
    """The negative of a sample: sample `row`, of `kind`, below threshold number `level`."""

    row: int
    kind: str
    level: int
    visual: float
    text: float


def neighbours(pool: Pool, rule: Rule, device: str = "cpu", progress: Progress = iter) -> Neighbours:
    """Each sample's neighbours and what each is good for. Blocks of samples against all: never an N x N matrix."""
    num, k = len(pool), min(rule.k_nn, max(1, len(pool) - 1))
    rows_NK, visual_NK = np.full((num, k), -1, np.int64), np.full((num, k), -np.inf, np.float32)
    text_NK = np.zeros((num, k), np.float32)
    search = _Search(pool, device)
    size = max(BLOCK_SAMPLES, BLOCK_NUMBERS // max(1, num))
    for start in progress(range(0, num, size)) if num > 1 else ():
        block = slice(start, min(start + size, num))
        rows_NK[block], visual_NK[block] = search.best(block, k)
        theirs_BKE = pool.texts_TE[pool.text_of_N[rows_NK[block]]]
        text_NK[block] = np.matmul(theirs_BKE, pool.texts_TE[pool.text_of_N[block]][:, :, None])[:, :, 0]
    return Neighbours(rows_NK, visual_NK, text_NK, _codes(pool, rule, rows_NK, visual_NK, text_NK))


def _codes(pool: Pool, rule: Rule, rows_NK: Rows, visual_NK: Floats, text_NK: Floats) -> Small:
    texts_NK = pool.text_of_N[rows_NK]
    codes = np.zeros(rows_NK.shape, np.int8)
    for threshold in thresholds(rule.cosine_threshold):
        codes += text_NK >= threshold
    codes[pool.uses_T[texts_NK] == 0] = GENERIC
    codes[texts_NK == pool.text_of_N[:, None]] = SAME
    codes[visual_NK < np.float32(rule.min_visual_similarity)] = LOW
    codes[rows_NK < 0] = ABSENT
    return codes


class _Mates:
    """For blocks of samples, all that share a value with each."""

    def __init__(self, of_N: Rows) -> None:
        _, value_N, counts = np.unique(of_N, return_inverse=True, return_counts=True)
        self._order, ends = np.argsort(of_N, kind="stable"), np.cumsum(counts)
        self._starts_N, self._counts_N = (ends - counts)[value_N], counts[value_N]

    def pairs(self, block: slice) -> tuple[Rows, Rows]:
        """Places in the block and rows, a pair per sample of it and mate, itself too."""
        counts_B = self._counts_N[block]
        before_B = np.cumsum(counts_B) - counts_B
        mates = np.repeat(self._starts_N[block] - before_B, counts_B) + np.arange(counts_B.sum())
        return np.repeat(np.arange(len(counts_B)), counts_B), self._order[mates]


class _Search:
    """All samples' visual vectors, and the best others for a block of them."""

    def __init__(self, pool: Pool, device: str) -> None:
        import torch

        vectors_ND = np.ascontiguousarray(pool.visual_VD[pool.image_of_N])
        self._vectors_ND = torch.from_numpy(vectors_ND).to(device)
        self._mates = [_Mates(pool.image_of_N), _Mates(pool.group_of_N)]

    def best(self, block: slice, k: int) -> tuple[Rows, Floats]:
        """Rows (B, K) and similarities. `topk` keeps any of tied rows, so a tie at the edge is settled row by row."""
        import torch

        scores_BN = self._vectors_ND[block] @ self._vectors_ND.T
        for mates in self._mates:
            places, others = (torch.from_numpy(x).to(scores_BN.device) for x in mates.pairs(block))
            scores_BN[places, others] = -torch.inf
        found = torch.topk(scores_BN, min(k + 1, scores_BN.shape[1]), dim=1)
        values, rows = found.values.cpu().numpy(), found.indices.cpu().numpy()
        tied = np.flatnonzero((values[:, k - 1] == values[:, -1]) & np.isfinite(values[:, -1]))
        by_row = np.argsort(rows[:, :k], axis=1)
        rows, values = (np.take_along_axis(x[:, :k], by_row, 1) for x in (rows, values))
        order = np.argsort(-values, axis=1, kind="stable")
        rows, values = (np.take_along_axis(x, order, 1) for x in (rows, values))
        for i in tied:
            scores = scores_BN[i].cpu().numpy()
            rows[i] = best_of(scores, np.flatnonzero(scores >= values[i, -1]), k)
            values[i] = scores[rows[i]]
        rows[~np.isfinite(values)] = -1
        return rows, values


@dataclass(frozen=True, slots=True)
class Clusters:
    """Visual clusters: each image's, and their centroids."""

    of_V: Rows
    centroids_CD: Floats

    def farthest(self) -> Rows:
        """Each cluster's farthest other one by Euclidean distance of the centroids, ties by number; -1 for a single."""
        squared = (self.centroids_CD**2).sum(axis=1)
        distances = squared[:, None] + squared[None, :] - 2 * self.centroids_CD @ self.centroids_CD.T
        np.fill_diagonal(distances, -np.inf)
        return np.argmax(distances, axis=1) if len(distances) > 1 else np.full(len(distances), -1)


class _Chooser:
    """Choices in the samples' order, since each one counts as a use of its text. `passed_over`: texts used up."""

    def __init__(self, pool: Pool, near: Neighbours, clusters: Clusters, rule: Rule) -> None:
        self._pool, self._near, self._rule = pool, near, rule
        self._levels = thresholds(rule.cosine_threshold)
        self._left_T = pool.uses_T.copy()
        of_N = clusters.of_V[pool.image_of_N]
        members = np.split(np.argsort(of_N, kind="stable"), np.cumsum(np.bincount(of_N))[:-1])
        empty = np.zeros(0, np.int64)
        self._far = [members[far] if 0 <= far < len(members) else empty for far in clusters.farthest()]
        self._cluster_of_N = of_N
        self.passed_over = 0
        k = near.rows_NK.shape[1]
        short_NK = pool.short_T[pool.text_of_N[near.rows_NK]]
        keys = np.where(near.codes_NK < RAISES, near.codes_NK + RAISES * short_NK, 2 * RAISES).astype(np.int8)
        self._order_NK = np.argsort(keys, axis=1, kind="stable").astype(np.int32 if k > 127 else np.int8)
        self._num_long_N, self._num_N = (keys < RAISES).sum(1), (keys < 2 * RAISES).sum(1)

    def choose(self, i: int, diverse_first: bool) -> Negative | None:
        """Long texts of the first kind, of the other, then short texts of both; None where there is none."""
        kinds = (self._diverse, self._hard) if diverse_first else (self._hard, self._diverse)
        for short in (False, True):
            for kind in kinds:
                found = kind(i, short)
                if found is not None:
                    self._left_T[self._pool.text_of_N[found.row]] -= 1
                    return found
        return None

    def _hard(self, i: int, short: bool) -> Negative | None:
        """The best in looks of those below the lowest threshold that lets any through."""
        near, long = self._near, self._num_long_N[i]
        for place in self._order_NK[i, long : self._num_N[i]] if short else self._order_NK[i, :long]:
            row = near.rows_NK[i, place]
            if self._left_T[self._pool.text_of_N[row]] > 0:
                visual, text = near.visual_NK[i, place], near.text_NK[i, place]
                return Negative(int(row), HARD, int(near.codes_NK[i, place]), float(visual), float(text))
            self.passed_over += 1
        return None

    def _diverse(self, i: int, short: bool) -> Negative | None:
        """The first, in an order drawn for this sample, below the lowest threshold that lets any through."""
        pool, members = self._pool, self._far[self._cluster_of_N[i]]
        mine_E, found = pool.texts_TE[pool.text_of_N[i]], (RAISES, -1, 0.0)
        drawn = members[np.random.default_rng([self._rule.seed, 2, i]).permutation(len(members))]
        for start in range(0, len(drawn), DRAWN):
            rows = drawn[start : start + DRAWN]
            texts = pool.text_of_N[rows]
            scores = pool.texts_TE[texts] @ mine_E
            levels = (scores[:, None] >= self._levels).sum(axis=1)
            levels[(self._left_T[texts] <= 0) | (pool.short_T[texts] != short) | pool.barred(i, rows)] = RAISES
            at = int(np.argmin(levels))
            if levels[at] < found[0]:
                found = (int(levels[at]), int(rows[at]), float(scores[at]))
            if found[0] == 0:
                break
        level, row, text = found
        if row < 0:
            return None
        visual = pool.visual_VD[pool.image_of_N[row]] @ pool.visual_VD[pool.image_of_N[i]]
        return Negative(row, DIVERSE, level, float(visual), text)


def diverse_first(num: int, rule: Rule) -> Mask:
    """Which samples look for a diverse negative first: a share of `diverse_ratio`, drawn by the seed."""
    return np.random.default_rng([rule.seed, 1]).random(num) < rule.diverse_ratio


def choose(
    pool: Pool, near: Neighbours, clusters: Clusters, rule: Rule, progress: Progress = iter
) -> tuple[list[Negative | None], int]:
    """Each sample's negative, and how many candidates were passed over because their text was used up.

    In the samples' order. Hard or diverse is looked for first, as drawn; then the other kind; then both again with
    short texts. Nothing is chosen where none of them finds any.
    """
    first, chooser, out = diverse_first(len(pool), rule), _Chooser(pool, near, clusters, rule), []
    for start in progress(range(0, len(pool), 1024)):
        out += [chooser.choose(i, bool(first[i])) for i in range(start, min(start + 1024, len(pool)))]
    return out, chooser.passed_over
