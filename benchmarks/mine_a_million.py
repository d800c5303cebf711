"""Time and peak memory of `top_k` and `band` over memory-mapped galleries of growing size.

Unit vectors in clusters of about 100, float32, written to .npy files of at most 250,000 rows in a
temporary directory; a query lies between its target and the centre of the target's cluster. Each
case runs in a process of its own, bound to `--cores` cores, so that its peak of resident memory
(VmHWM, the pages of the mapped gallery included) is its own. Prints seconds, queries per second and
that peak, and the exponent b of seconds ~ G^b by least squares on logarithms, with its standard
error.

    python benchmarks/mine_a_million.py
    python benchmarks/mine_a_million.py --queries 200 --sizes 2000 5000 10000
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

PER_FILE, PER_CLUSTER, WIDTH = 250_000, 100, 256
STRATEGIES = ("top_k", "band")


def unit(rows: Any) -> Any:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def write(directory: Path, size: int, num_queries: int) -> None:
    """`gallery/*.npy`, `queries.npy` and `targets.npy`."""
    random = np.random.default_rng(size)

    def noise(num: int) -> Any:
        return random.standard_normal((num, WIDTH), np.float32) / np.float32(WIDTH**0.5)

    centres = unit(noise(max(1, size // PER_CLUSTER)))
    targets = random.integers(0, size, num_queries)
    queries = np.empty((num_queries, WIDTH), np.float32)
    (directory / "gallery").mkdir(parents=True)
    for start in range(0, size, PER_FILE):
        num = min(PER_FILE, size - start)
        cluster = random.integers(0, len(centres), num)
        rows = unit(centres[cluster] + 0.8 * noise(num))
        np.save(directory / "gallery" / f"{start // PER_FILE:05d}.npy", rows)
        asked = np.flatnonzero((targets >= start) & (targets < start + num))
        at = targets[asked] - start
        queries[asked] = unit(0.3 * rows[at] + centres[cluster[at]] + 0.5 * noise(len(asked)))
    np.save(directory / "queries.npy", queries)
    np.save(directory / "targets.npy", targets)


def mine_once(directory: Path, name: str) -> dict[str, float]:
    """What one process does: seconds, peak gigabytes, images mined."""
    import torch

    from cirloop.negatives import MiningSettings
    from cirloop.negatives.base import MiningContext
    from cirloop.negatives.miner import MiningInputs, mine
    from cirloop.retrieval.vectors import open_vectors, validate_embeddings

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    began = time.monotonic()
    gallery = validate_embeddings(open_vectors(directory / "gallery"), "gallery")
    vectors = MiningInputs(
        np.load(directory / "queries.npy"), gallery, np.load(directory / "targets.npy")
    )
    settings = MiningSettings(
        strategy={"type": name, "negatives_per_query": 3}, only_failed_queries=False
    )
    num = sum(len(found.gallery_indices) for found in mine(settings, vectors, MiningContext(0)))
    seconds = time.monotonic() - began
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {"seconds": seconds, "peak": int(status["VmHWM"].split()[0]) * 1024 / 1e9, "mined": num}


def exponent(sizes: list[int], seconds: list[float]) -> tuple[float, float]:
    """The slope of log seconds over log size, and its standard error."""
    x, y = np.log(sizes), np.log(seconds)
    x = x - x.mean()
    slope = float((x * y).sum() / (x**2).sum())
    rest = y - y.mean() - slope * x
    return slope, float(np.sqrt((rest**2).sum() / max(1, len(x) - 2) / (x**2).sum()))


def in_process(directory: Path, name: str, cores: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", str(directory), name]
    mine = sorted(os.sched_getaffinity(0))[:cores]
    done = subprocess.run(
        command,
        check=True,
        capture_output=True,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, mine),
    )
    made: dict[str, float] = json.loads(done.stdout)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--queries", type=int, default=20_000)
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[10_000, 30_000, 100_000, 300_000, 1_000_000]
    )
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=[*STRATEGIES])
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument(
        "--directory", type=Path, help="where the vectors are written for a time (1.3 GB at 1 M)"
    )
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(mine_once(Path(args.one[0]), args.one[1])))
        return
    seconds: dict[str, list[float]] = {name: [] for name in args.strategies}
    for size in args.sizes:
        with tempfile.TemporaryDirectory(dir=args.directory) as there:
            write(Path(there) / "made", size, args.queries)
            for name in args.strategies:
                made = in_process(Path(there) / "made", name, args.cores)
                seconds[name].append(made["seconds"])
                print(
                    f"{name}, {args.queries:,} queries, {size:,} images of {WIDTH}:"
                    f" {made['seconds']:.1f} s, {args.queries / made['seconds']:.0f} queries/s,"
                    f" peak {made['peak']:.2f} GB, {made['mined']} mined",
                    flush=True,
                )
    for name, taken in seconds.items():
        if len(args.sizes) > 2:
            slope, error = exponent(args.sizes, taken)
            print(f"{name}: seconds ~ G^b, b = {slope:.2f} ± {error:.2f} over {len(taken)} sizes")


if __name__ == "__main__":
    from cirloop.reproducibility import prepare_process

    prepare_process()
    main()
