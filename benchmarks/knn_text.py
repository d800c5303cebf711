"""`knn_text` on samples against the straightforward loop: 10,000 samples, vectors alone.

The loop takes one sample after the other: similarities to all, a sort, and a walk over the
neighbours. Both sides are given the same clusters, whose making is not timed, and must choose the
same negatives. The vectors are multiples of 1/512 in each of their dimensions, so that their dot
products are exact in any order of addition; a last bit cannot decide. `random`: directions drawn
evenly; `clustered`: around 100 centres, one in ten samples a further text of an image that is there
already. Prints seconds and the ratio with its standard error over the repeats.

    OMP_NUM_THREADS=2 python benchmarks/knn_text.py
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import numpy as np

from cirloop.negatives.knn_text_samples import (
    Clusters,
    KnnTextParams,
    Negative,
    SamplePool,
    choose,
    neighbours,
)
from cirloop.negatives.strategies.knn_text import thresholds
from cirloop.reproducibility import prepare_process


class Loop:
    """The rule as it is said, one sample and one candidate after the other."""

    def __init__(self, pool: SamplePool, clusters: Clusters, rule: KnnTextParams) -> None:
        self.pool, self.clusters, self.rule = pool, clusters, rule
        self.left = {text: int(uses) for text, uses in enumerate(pool.max_uses_T)}
        self.num_exhausted = 0
        self.drops: list[list[str]] = []
        self.cluster_of = [int(clusters.of_V[image]) for image in pool.image_of_N]

    def run(self) -> list[Negative | None]:
        draws = np.random.default_rng([self.rule.seed, 1]).random(len(self.pool))
        return [self.one(i, bool(draw < self.rule.diverse_ratio)) for i, draw in enumerate(draws)]

    def one(self, i: int, diverse_first: bool) -> Negative | None:
        near = self.near(i)
        self.drops.append([self.why(i, row, visual) for row, visual in near])
        for short in (False, True):
            for kind in ("diverse", "hard") if diverse_first else ("hard", "diverse"):
                found = self.hard(i, near, short) if kind == "hard" else self.diverse(i, short)
                if found is not None:
                    self.left[int(self.pool.text_of_N[found.row])] -= 1
                    return found
        return None

    def may(self, i: int, row: int) -> bool:
        """Neither of the same image nor of the same group."""
        pool = self.pool
        return bool(
            pool.image_of_N[row] != pool.image_of_N[i]
            and pool.group_of_N[row] != pool.group_of_N[i]
        )

    def near(self, i: int) -> list[tuple[int, float]]:
        pool = self.pool
        visual = (pool.visual_VD @ pool.visual_VD[pool.image_of_N[i]])[pool.image_of_N]
        order = np.argsort(-visual, kind="stable")
        out: list[tuple[int, float]] = []
        for row in order:
            if len(out) == self.rule.k_nn:
                break
            if self.may(i, int(row)):
                out.append((int(row), float(visual[row])))
        return out

    def likeness(self, i: int, row: int) -> np.float32:
        pool = self.pool
        found: np.float32 = np.dot(
            pool.texts_TE[pool.text_of_N[row]], pool.texts_TE[pool.text_of_N[i]]
        )
        return found

    def why(self, i: int, row: int, visual: float) -> str:
        """What drops a neighbour, the first reason of these; empty where it is a candidate."""
        text = int(self.pool.text_of_N[row])
        if np.float32(visual) < np.float32(self.rule.min_visual_similarity):
            return "low"
        if text == self.pool.text_of_N[i]:
            return "same"
        if self.pool.max_uses_T[text] == 0:
            return "generic"
        return "" if self.likeness(i, row) < thresholds(self.rule.cosine_threshold)[-1] else "near"

    def usable(self, row: int, short: bool) -> bool:
        text = int(self.pool.text_of_N[row])
        return self.pool.max_uses_T[text] > 0 and bool(self.pool.short_T[text]) == short

    def hard(self, i: int, near: list[tuple[int, float]], short: bool) -> Negative | None:
        for level, threshold in enumerate(thresholds(self.rule.cosine_threshold)):
            for row, visual in near:
                if np.float32(visual) < np.float32(
                    self.rule.min_visual_similarity
                ) or not self.usable(row, short):
                    continue
                if (
                    self.pool.text_of_N[row] == self.pool.text_of_N[i]
                    or not self.likeness(i, row) < threshold
                ):
                    continue
                if (
                    level
                    and self.likeness(i, row) < thresholds(self.rule.cosine_threshold)[level - 1]
                ):
                    continue  # seen at the threshold before, and used up
                if self.left[int(self.pool.text_of_N[row])] > 0:
                    return Negative(row, "hard", level, visual, float(self.likeness(i, row)))
                self.num_exhausted += 1
        return None

    def farthest(self, i: int) -> int | None:
        own, centroids = self.cluster_of[i], self.clusters.centroids_CD
        others = [c for c in range(len(centroids)) if c != own]
        return max(
            others,
            key=lambda c: (float(((centroids[c] - centroids[own]) ** 2).sum()), -c),
            default=None,
        )

    def diverse(self, i: int, short: bool) -> Negative | None:
        far, pool = self.farthest(i), self.pool
        members = [row for row in range(len(pool)) if self.cluster_of[row] == far]
        order = np.random.default_rng([self.rule.seed, 2, i]).permutation(len(members))
        for level, threshold in enumerate(thresholds(self.rule.cosine_threshold)):
            for place in order:
                row = members[place]
                text = int(pool.text_of_N[row])
                if not self.may(i, row) or text == pool.text_of_N[i] or not self.usable(row, short):
                    continue
                if self.left[text] > 0 and self.likeness(i, row) < threshold:
                    visual = np.dot(
                        pool.visual_VD[pool.image_of_N[row]], pool.visual_VD[pool.image_of_N[i]]
                    )
                    return Negative(
                        row, "diverse", level, float(visual), float(self.likeness(i, row))
                    )
        return None


def exact(vectors: Any) -> Any:
    """Nearly unit norm, in steps of 1/512."""
    return (np.round(vectors / np.linalg.norm(vectors, axis=1, keepdims=True) * 512) / 512).astype(
        np.float32
    )


def make(kind: str, num: int, dimensions: int) -> tuple[SamplePool, Clusters]:
    """Samples of `kind`, and 70 clusters of them by the nearest of 70 images."""
    random = np.random.default_rng(0)
    images = num if kind == "random" else num - num // 10
    visual, texts = (random.standard_normal((n, dimensions)) for n in (images, num))
    if kind == "clustered":
        visual += 1.5 * random.standard_normal((100, dimensions))[random.integers(0, 100, images)]
        texts += 1.0 * random.standard_normal((100, dimensions))[random.integers(0, 100, num)]
    else:  # something to be near to: no two directions of so many dimensions are
        visual, texts = visual + 0.7 * random.standard_normal(dimensions), texts + 0.5
    visual_VD, texts_TE = exact(visual), exact(texts)
    image_of_N = np.concatenate([np.arange(images), random.integers(0, images, num - images)])
    lengths_T = random.integers(1, 60, num)
    uses_T = np.where(
        lengths_T < 3, 0, np.where(lengths_T < 20, np.maximum(1, 3 * lengths_T // 20), 3)
    )
    pool = SamplePool(
        visual_VD,
        image_of_N,
        texts_TE,
        np.arange(num),
        random.integers(0, num // 4, num),
        uses_T,
        lengths_T < 20,
    )
    centroids_CD = visual_VD[:70]
    return pool, Clusters(np.argmax(visual_VD @ centroids_CD.T, axis=1), centroids_CD)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--dimensions", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", default=["random", "clustered"])
    args = parser.parse_args()
    rule = KnnTextParams()
    small, few = make("random", 100, 8)
    choose(small, neighbours(small, rule), few, rule)  # the first call loads libraries
    for kind in args.kinds:
        pool, clusters = make(kind, args.samples, args.dimensions)
        seconds = []
        for _ in range(args.repeats):
            began = time.perf_counter()
            ours, num_exhausted = choose(pool, neighbours(pool, rule), clusters, rule)
            between = time.perf_counter()
            loop = Loop(pool, clusters, rule)
            theirs = loop.run()
            seconds.append((between - began, time.perf_counter() - between))
            if ours != theirs or num_exhausted != loop.num_exhausted:
                sys.exit(f"{kind}: the two sides do not choose the same negatives")
        fast, slow = np.array(seconds).T
        error = np.std(slow / fast, ddof=1) / len(fast) ** 0.5 if len(fast) > 1 else float("nan")
        kinds = [negative.kind if negative else "none" for negative in ours]
        counts = ", ".join(f"{kinds.count(name)} {name}" for name in ("hard", "diverse", "none"))
        ratio = f"{np.mean(slow / fast):.1f} ± {error:.1f} times as fast"
        print(
            f"{kind}: {np.mean(fast):.2f} s against {np.mean(slow):.1f} s, {ratio}; the same"
            f" {counts}"
        )


if __name__ == "__main__":
    prepare_process()
    main()
