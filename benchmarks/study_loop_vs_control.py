"""Does the loop pay? Mined and captioned against controls that spend the same optimisation steps,
over seeds.

Arms, after one shared warm-up per seed: `loop` (mine, caption, train), `control` (human triplets
alone), `random` (random instead of mined images, captioned and checked alike), `negatives` (mined
images as negatives, no new texts), `longer` (the control with 1.4 times the steps: the loop's mined
negatives add up to 3/8 to the images of a step). Prints, for each arm, recalls on `shapes` test
with the standard error over seeds, the paired gain over `control`, and the share of true captions
and of false negatives.

    python benchmarks/study_loop_vs_control.py --seeds 5 --output experiments/study
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cirloop.artifacts.atomic import write_json
from cirloop.cli import entry, runner
from cirloop.config.run import RunConfig, save
from cirloop.config.run_dir import CONFIG
from cirloop.monitoring.console import table

TOP_K = {"type": "top_k", "negatives_per_query": 3, "extra_ranks": "all"}
ARMS: dict[str, dict[str, Any]] = {
    "loop": {"mining": {"strategy": TOP_K}},
    "control": {"mining": {"strategy": {"type": "none"}}},
    "random": {"mining": {"strategy": {"type": "random", "negatives_per_query": 3}}},
    "negatives": {"mining": {"strategy": TOP_K}, "captioning": {"enabled": False}},
    "longer": {"mining": {"strategy": {"type": "none"}}},
}
RECALLS = ("recall@1", "recall@5", "any correct recall@1")


def config(
    args: argparse.Namespace, seed: int, directory: Path, rounds: int, arm: str
) -> RunConfig:
    settings: dict[str, Any] = {
        "model": {"path": "tiny", "dtype": "float32"},
        "foundation": {"path": "tiny", "dtype": "float32"},
        "data": {
            "train_families": args.families,
            "train_triplets": args.triplets,
            "eval_families": args.eval_families,
            "subset_seed": seed,
        },
        "training": {
            "iteration_0_steps": args.warm_up,
            "steps_per_iteration": round(1.4 * args.steps) if arm == "longer" else args.steps,
            "batch_size": args.batch_size,
            "loss": {"temperature": args.temperature},
            "augmented_fraction": args.augmented_fraction,
            "negatives_in_batch": args.num_negatives,
        },
        "captioning": {
            "num_candidates": 2,
            "min_verify_probability": 0.6,
            "max_round_trip_rank": 3,
        },
        "evaluation": {"split": args.split, "evaluate_base": False},
        "runtime": {
            "embed_batch_size": 128,
            "checkpoint_every_steps": 0,
            "cache_dir": args.output / "cache",
        },
    }
    for name, value in ARMS[arm].items():
        settings[name] = {**settings.get(name, {}), **value}
    return RunConfig(
        experiment_dir=directory, seed=seed, num_iterations=rounds, auto_resume=True, **settings
    )


def run_arm(args: argparse.Namespace, seed: int, arm: str) -> dict[str, Any]:
    """The last evaluation of one arm; the warm-up is made once per seed and copied."""
    kind = (
        arm if arm == "longer" else "control"
    )  # the steps of a round are in the warm-up's fingerprint
    warm, directory = args.output / f"warm_{kind}_{seed}", args.output / f"{arm}_{seed}"
    began = time.monotonic()
    runner.run(config(args, seed, warm, 0, kind))
    if not directory.exists():
        aside = args.output / f".{arm}_{seed}"
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(warm, aside)
        save(
            config(args, seed, directory, args.rounds, arm), aside / CONFIG
        )  # it stays the run of its manifest
        aside.rename(directory)
    results = runner.run(config(args, seed, directory, args.rounds, arm))
    accounts = [json.loads(p.read_text()) for p in sorted(directory.glob("accounting_iter_*.json"))]
    total = {
        key: sum(a[key] for a in accounts)
        for key in ("mined", "false_negatives", "accepted", "true_captions")
    }
    recalls = {k: [100 * r["metrics"][k] for r in results] for k in RECALLS}
    return {
        "arm": arm,
        "seed": seed,
        "recalls": recalls,
        **total,
        "seconds": round(time.monotonic() - began, 1),
    }


def mean_se(values: list[float]) -> str:
    spread = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{np.mean(values):.1f} ± {spread:.1f}"


def report(rows: list[dict[str, Any]], rounds: int, split: str) -> None:
    by = {(r["arm"], r["seed"]): r for r in rows}
    arms = [arm for arm in ARMS if arm in {r["arm"] for r in rows}]
    seeds = sorted({r["seed"] for r in rows if all((arm, r["seed"]) in by for arm in arms)})
    lines = []
    for arm in arms:
        mine = [by[arm, s] for s in seeds]
        gains = [""] * len(RECALLS)
        if arm != "control" and "control" in arms:
            pairs = [(r["recalls"], by["control", r["seed"]]["recalls"]) for r in mine]
            gains = [
                mean_se([ours[k][-1] - theirs[k][-1] for ours, theirs in pairs]) for k in RECALLS
            ]
        mined, accepted = sum(r["mined"] for r in mine), sum(r["accepted"] for r in mine)
        lines.append(
            [
                arm,
                mean_se([r["recalls"]["recall@1"][0] for r in mine]),
                *(mean_se([r["recalls"][k][-1] for r in mine]) for k in RECALLS),
                *gains,
                f"{100 * sum(r['false_negatives'] for r in mine) / mined:.1f}%" if mined else "",
                f"{accepted / len(mine):.0f}" if accepted else "",
                (
                    f"{100 * sum(r['true_captions'] for r in mine) / accepted:.1f}%"
                    if accepted
                    else ""
                ),
            ]
        )
    short = ("R@1", "R@5", "any R@1")
    columns = ("arm", "warm-up", *short, *(f"+ {k}" for k in short), "false neg.", "texts", "true")
    table(
        f"shapes {split}, {len(seeds)} seeds, {rounds} rounds, mean ± standard error over seeds",
        columns,
        lines,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("experiments/study"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first_seed", type=int, default=1)
    parser.add_argument("--arms", default="loop,control,random")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--families", type=int, default=100)
    parser.add_argument("--triplets", type=int, default=400)
    parser.add_argument("--eval_families", type=int, default=182)
    parser.add_argument("--warm_up", type=int, default=60)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--temperature", type=float, default=0.05)
    parser.add_argument("--augmented_fraction", type=float, default=0.25)
    parser.add_argument("--num_negatives", type=int, default=1)
    parser.add_argument(
        "--split", choices=("val", "test"), default="test", help="choose settings on val"
    )
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 = all")
    parser.add_argument("--report_only", action="store_true")
    args = parser.parse_args(sys.argv[1:])
    args.output = args.output.absolute()
    if args.threads:
        torch.set_num_threads(args.threads)
    logging.getLogger("cirloop").setLevel(logging.WARNING)
    args.output.mkdir(parents=True, exist_ok=True)
    for seed in (
        range(args.first_seed, args.first_seed + args.seeds) if not args.report_only else ()
    ):
        for arm in args.arms.split(","):
            row = run_arm(args, seed, arm)
            write_json(args.output / f"row_{arm}_{seed}.json", row)
    rows = [json.loads(p.read_text()) for p in sorted(args.output.glob("row_*.json"))]
    report(rows, args.rounds, args.split)


if __name__ == "__main__":
    entry.main_wrapper(main)
