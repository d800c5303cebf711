"""Do adapters in a bfloat16 base's own dtype learn as well as float32 adapters? Over seeds, one shared setting.

Trains iteration 0 of `tiny` in bfloat16 on `shapes` twice per seed, with `training.lora.dtype` float32 and base (whose
optimizer keeps float32 masters), and prints the recalls of both with standard errors over seeds, and those of the
paired difference.

    python benchmarks/adapter_dtype.py --seeds 4 --output experiments/adapter_dtype
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cirloop import experiment
from cirloop.config import RunConfig
from cirloop.report.terminal import table

DTYPES = ("float32", "base")
RECALLS = ("recall@1", "recall@5", "any correct recall@1")


def recalls(args: argparse.Namespace, seed: int, dtype: str) -> list[float]:
    """Test recalls of iteration 0, in percent."""
    settings: dict[str, Any] = {
        "model": {"path": "tiny", "dtype": "bfloat16"},
        "data": {
            "train_families": args.families,
            "train_triplets": args.triplets,
            "eval_families": args.eval_families,
            "subset_seed": seed,
        },
        "training": {
            "warm_up_steps": args.steps,
            "batch_size": args.batch_size,
            "loss": {"temperature": 0.05},
            "lora": {"dtype": dtype},
        },
        "evaluation": {"base": False},
        "runtime": {"embed_batch_size": 128, "save_every": 0, "cache_dir": args.output / "cache"},
    }
    directory = args.output / f"{dtype}_{seed}"
    config = RunConfig(experiment_dir=directory, seed=seed, num_iterations=0, auto_resume=True, **settings)
    [result] = experiment.run(config)
    return [100 * result["metrics"][key] for key in RECALLS]


def mean_se(values_S: np.ndarray) -> str:
    spread = values_S.std(ddof=1) / len(values_S) ** 0.5 if len(values_S) > 1 else float("nan")
    return f"{values_S.mean():.2f} ± {spread:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("experiments/adapter_dtype"))
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--families", type=int, default=100)
    parser.add_argument("--triplets", type=int, default=400)
    parser.add_argument("--eval_families", type=int, default=60)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.basicConfig(level=logging.WARNING)
    by_dtype = {dtype: np.array([recalls(args, seed, dtype) for seed in range(1, args.seeds + 1)]) for dtype in DTYPES}
    difference_SK = by_dtype["base"] - by_dtype["float32"]
    rows = [[name, *map(mean_se, values_SK.T)] for name, values_SK in {**by_dtype, "difference": difference_SK}.items()]
    title = f"training.lora.dtype, bfloat16 base, {args.seeds} seeds, {args.steps} steps, mean ± standard error"
    table(title, ("dtype", "R@1", "R@5", "any R@1"), rows)


if __name__ == "__main__":
    main()
