"""Do adapters in a bfloat16 base's own dtype learn as well as float32 adapters? Over seeds, one
shared setting.

Trains iteration 0 of `tiny` in bfloat16 on `shapes` twice per seed, with `training.lora.dtype`
float32 and base (whose optimizer keeps float32 masters), and prints the recalls of both with
standard errors over seeds, and those of the paired difference.

    python benchmarks/adapter_dtype.py --seeds 4 --output experiments/adapter_dtype
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import _study as study
import numpy as np
import torch
from study_rounds import RECALLS, STUDY

from cirloop.cli import runner
from cirloop.monitoring.console import table
from cirloop.reproducibility import prepare_process

DTYPES = ("float32", "base")


def recalls(args: argparse.Namespace, seed: int, dtype: str) -> list[float]:
    """Test recalls of iteration 0, in percent."""
    config = study.config(STUDY, args, seed, args.output / f"{dtype}_{seed}", 0, "control")
    training = config.training.model_copy(
        update={"lora": config.training.lora.model_copy(update={"dtype": dtype})}
    )
    model = config.model.model_copy(update={"dtype": "bfloat16"})
    [result] = runner.run(config.model_copy(update={"model": model, "training": training}))
    return [100 * result["metrics"][key] for key in RECALLS]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("experiments/adapter_dtype"))
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--families", type=int, default=100)
    parser.add_argument("--triplets", type=int, default=400)
    parser.add_argument("--eval_families", type=int, default=60)
    parser.add_argument("--warm_up", type=int, default=60, help="steps")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.set_defaults(steps=0, temperature=0.05, split="test", variant=1, profile=False)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.getLogger("cirloop").setLevel(logging.WARNING)
    seeds = range(1, args.seeds + 1)
    by_dtype = {dtype: np.array([recalls(args, seed, dtype) for seed in seeds]) for dtype in DTYPES}
    by_dtype["difference"] = by_dtype["base"] - by_dtype["float32"]
    rows = [
        [name, *map(study.mean_se, recalls_SK.T.tolist())] for name, recalls_SK in by_dtype.items()
    ]
    title = (
        f"training.lora.dtype, bfloat16 base, {args.seeds} seeds, {args.warm_up} steps, mean ±"
        " standard error"
    )
    table(title, ("dtype", "R@1", "R@5", "any R@1"), rows)


if __name__ == "__main__":
    prepare_process()
    main()
