"""What `band` does on score curves from steep steps to perfectly smooth ones, with noise.

Each query has `--images` images below its target, whose scores follow a curve of their rank; the
first 10 are right answers that nobody annotated. Prints, per curve, noise and variant, the median
size of the set, the share of false negatives in it, how alike the sets of two draws of the noise
are (Jaccard), and how many queries had no two cliffs (the whole tail).

    python benchmarks/band_on_curves.py
"""

from __future__ import annotations

import argparse

import numpy as np

from cirloop.monitoring.console import table
from cirloop.negatives.strategies.band import band
from cirloop.reproducibility import prepare_process

RIGHT = 10


def curves(images: int) -> dict[str, np.ndarray]:
    """Scores by rank."""
    rank = np.arange(images)
    return {
        "two steps": np.where(rank < RIGHT, 0.8, np.where(rank < 60, 0.5, 0.2)) - 1e-4 * rank,
        "two soft steps": (
            0.2 + 0.3 / (1 + np.exp((rank - 10) / 1.5)) + 0.3 / (1 + np.exp((rank - 60) / 3))
        ),
        "logistic": 0.1 + 0.7 / (1 + np.exp((rank - 60) / 15)),
        "power law": 0.8 * (1 + rank) ** -0.3,
        "linear": 0.8 - 0.0014 * rank,
    }


def draw(curve: np.ndarray, queries: int, noise: float, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    return (curve + noise * random.standard_normal((queries, len(curve)))).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--images", type=int, default=500, help="below the target")
    args = parser.parse_args()
    rows = []
    everything = np.ones((args.queries, args.images), bool)
    for name, curve in curves(args.images).items():
        for noise in (0.0, 0.002, 0.02):
            for variant in ("paper", "released"):
                drawn = [draw(curve, args.queries, noise, seed) for seed in (0, 1)]
                first, second = (band(scores, everything, variant) for scores in drawn)  # type: ignore[arg-type]
                both, either = (first & second).sum(axis=1), (first | second).sum(axis=1)
                false = first[:, :RIGHT].sum() / first.sum()
                whole = int((first.sum(axis=1) == args.images).sum())
                rows.append(
                    [
                        name,
                        noise,
                        variant,
                        f"{np.median(first.sum(axis=1)):.0f}",
                        f"{100 * false:.1f}%",
                        f"{np.mean(both / either):.2f}",
                        f"{whole} of {args.queries}",
                    ]
                )
    columns = (
        "curve",
        "noise",
        "variant",
        "set size, median",
        "false negatives",
        "Jaccard of two draws",
        "whole tail",
    )
    table(
        f"{args.queries} queries, {args.images} images below the target, the first {RIGHT} of them"
        " right",
        columns,
        rows,
    )


if __name__ == "__main__":
    prepare_process()
    main()
