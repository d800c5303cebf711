"""Many rounds in one process: do memory, open files and disk grow?

A very small run of `--rounds` iterations on the embedded data and model. After each iteration:
resident memory (VmRSS), open files (/proc/self/fd), threads, files and bytes of the run directory,
and bytes of the feature cache. An iteration leaves an adapter, negatives, texts and an evaluation,
so the run directory grows by as much; the rest should not grow once the first iterations have
filled what is kept. Prints a line per iteration, and the growth per iteration over the second half
by least squares with its standard error.

    python benchmarks/soak.py
    python benchmarks/soak.py --rounds 6
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import threading
from pathlib import Path

import numpy as np

from cirloop.cli import runner
from cirloop.config.run import RunConfig

COLUMNS = ("memory MB", "open files", "threads", "run files", "run MB", "cache MB")


def sample(run: Path, cache: Path) -> list[float]:
    status = Path("/proc/self/status").read_text("utf-8")
    memory = float(status.split("VmRSS:")[1].split()[0]) / 1e3
    kept = [path.stat().st_size for path in run.rglob("*") if path.is_file()]
    features = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    return [
        memory,
        len(os.listdir("/proc/self/fd")),
        threading.active_count(),
        len(kept),
        sum(kept) / 1e6,
        features / 1e6,
    ]


class Watch(logging.Handler):
    """Takes a sample when an iteration's evaluation is done, in the thread that did it."""

    def __init__(self, run: Path, cache: Path) -> None:
        super().__init__()
        self.run, self.cache, self.rows = run, cache, list[list[float]]()

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        if ", evaluation: done" in line:
            self.rows.append(sample(self.run, self.cache))
            print(
                f"{len(self.rows) - 1:3}",
                *(f"{value:12.1f}" for value in self.rows[-1]),
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        run, cache = Path(name) / "run", Path(name) / "cache"
        config = RunConfig.model_validate(
            {
                "experiment_dir": run,
                "num_iterations": args.rounds,
                "model": {"type": "qwen2_vl", "dtype": "float32"},
                "foundation": {"type": "qwen2_vl", "dtype": "float32"},
                "data": {
                    "type": "shapes",
                    "train_families": 12,
                    "train_triplets": 96,
                    "eval_families": 6,
                },
                "mining": {
                    "strategy": {"type": "top_k", "negatives_per_query": 2, "extra_ranks": "all"}
                },
                "captioning": {
                    "num_candidates": 2,
                    "min_verify_probability": 0.0,
                    "max_round_trip_rank": 66,
                },
                "training": {"iteration_0_steps": 6, "steps_per_iteration": 6, "batch_size": 12},
                "runtime": {"cache_dir": cache},
            }
        )
        watch = Watch(run, cache)
        logging.getLogger("cirloop").setLevel(logging.INFO)
        logging.getLogger("cirloop").addHandler(watch)
        print("it.", *(f"{column:>12}" for column in COLUMNS))
        runner.run(config)
    rows = np.array(watch.rows[len(watch.rows) // 2 :])
    at = np.arange(len(rows)) - (len(rows) - 1) / 2
    for column, values in zip(COLUMNS, rows.T, strict=True):
        slope = at @ values / (at @ at)
        left = values - values.mean() - slope * at
        error = (left @ left / (len(at) - 2) / (at @ at)) ** 0.5
        print(f"growth of {column} per iteration, second half: {slope:.3g} ± {error:.2g}")


if __name__ == "__main__":
    main()
