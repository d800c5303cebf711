"""What `band` does on score curves from steep steps to perfectly smooth ones, with noise.

Each query has 500 images below its target, whose scores follow a curve of their rank; the first 10 are right answers
that nobody annotated. Prints, per curve, noise and variant, the median size of the set, the share of false negatives in
it, how alike the sets of two draws of the noise are (Jaccard), and how many queries had no two cliffs (the whole tail).

    python benchmarks/band_on_curves.py
"""

from __future__ import annotations

import numpy as np

from cirloop.negatives.band import band
from cirloop.report.terminal import table

IMAGES, RIGHT, QUERIES = 500, 10, 200
RANK = np.arange(IMAGES)
CURVES = {
    "two steps": np.where(RANK < RIGHT, 0.8, np.where(RANK < 60, 0.5, 0.2)) - 1e-4 * RANK,
    "two soft steps": 0.2 + 0.3 / (1 + np.exp((RANK - 10) / 1.5)) + 0.3 / (1 + np.exp((RANK - 60) / 3)),
    "logistic": 0.1 + 0.7 / (1 + np.exp((RANK - 60) / 15)),
    "power law": 0.8 * (1 + RANK) ** -0.3,
    "linear": 0.8 - 0.0014 * RANK,
}


def draw(curve: np.ndarray, noise: float, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    return (curve + noise * random.standard_normal((QUERIES, IMAGES))).astype(np.float32)


def main() -> None:
    rows = []
    everything = np.ones((QUERIES, IMAGES), bool)
    for name, curve in CURVES.items():
        for noise in (0.0, 0.002, 0.02):
            for variant in ("paper", "released"):
                first, second = (band(draw(curve, noise, seed), everything, variant) for seed in (0, 1))  # type: ignore[arg-type]
                both, either = (first & second).sum(axis=1), (first | second).sum(axis=1)
                false = first[:, :RIGHT].sum() / first.sum()
                whole = int((first.sum(axis=1) == IMAGES).sum())
                rows.append(
                    [name, noise, variant, f"{np.median(first.sum(axis=1)):.0f}", f"{100 * false:.1f}%",
                     f"{np.mean(both / either):.2f}", f"{whole} of {QUERIES}"]
                )  # fmt: skip
    columns = ("curve", "noise", "variant", "set size, median", "false negatives", "Jaccard of two draws", "whole tail")
    table(f"{QUERIES} queries, {IMAGES} images below the target, the first {RIGHT} of them right", columns, rows)


if __name__ == "__main__":
    main()
