"""`band` over many queries against the straightforward loop, both from the same vectors, in turn.

The loop, per query: argsort of the scores, Python lists, `index` of the target, `np.diff`, argsort
of the drops. Both must give the same sets. Prints seconds of both and the ratio with its standard
error over the repeats.

    python benchmarks/band.py
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from cirloop.negatives import Band, MiningSettings
from cirloop.negatives.base import MiningContext
from cirloop.negatives.miner import MiningInputs, mine
from cirloop.reproducibility import prepare_process


def loop(scores_G: np.ndarray, target: int) -> list[int]:
    order = np.argsort(-scores_G, kind="stable").tolist()
    start = order.index(target) + 1
    tail = order[start:]
    drops = -np.diff(scores_G[tail])
    steepest = np.argsort(-drops, kind="stable")[:2].tolist()
    low, high = sorted(steepest)
    return tail[low + 1 : high + 1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--queries", type=int, default=5000)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--dimensions", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    random = np.random.default_rng(0)
    gallery = random.standard_normal((args.images, args.dimensions)).astype(np.float32)
    gallery /= np.linalg.norm(gallery, axis=1, keepdims=True)
    targets = random.integers(0, args.images, args.queries)
    queries = gallery[targets] + 0.08 * random.standard_normal(
        (args.queries, args.dimensions)
    ).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    ratios = []
    for _ in range(args.repeats):
        began = time.monotonic()
        plain = [
            loop(queries[i : i + 1].dot(gallery.T)[0], targets[i]) for i in range(args.queries)
        ]
        middle = time.monotonic()
        ours = [
            f.candidate_set
            for f in mine(
                MiningSettings(strategy=Band()),
                MiningInputs(queries, gallery, targets),
                MiningContext(0),
                sets=True,
            )
        ]
        ended = time.monotonic()
        ratios.append((middle - began) / (ended - middle))
        same = sum(
            a == set(np.asarray(b).tolist()) for a, b in zip(map(set, plain), ours, strict=True)
        )
        print(
            f"loop {middle - began:.2f} s, band {ended - middle:.2f} s; {same} of {args.queries}"
            " sets equal",
            flush=True,
        )
    spread = np.std(ratios, ddof=1) / len(ratios) ** 0.5
    print(
        f"loop / band, in time: {np.mean(ratios):.1f} ± {spread:.1f}; {args.queries} queries x"
        f" {args.images} images"
    )


if __name__ == "__main__":
    prepare_process()
    main()
