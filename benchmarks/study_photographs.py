"""What do texts from a catalogue buy on real photographs? `configs/grocery_clip.yaml` against
controls, over seeds that draw other human triplets.

Arms of a seed share iteration 0, but for the last three, whose iteration 0 has no judge either,
and spend the same optimisation steps:

    control    human triplets alone, random images as explicit negatives
    far        human triplets alone, explicit negatives from ranks 11 to 60
    loop       the recipe: images near the reference and self-made anchors, written anew each round
    once       the same, mined and written in the first round alone
    many_once  three times as many images and anchors, in the first round alone: about as many texts
               as `loop` has after three rounds, all for what the first model finds near
    failed     the recipe with texts that the catalogue affirms and by which the model does not find
               the image first
    near       images near the reference alone: what the model gets wrong is not looked at
    mistakes   what the model ranks too high, rewritten: mining as it is usually meant
    no_judge   the recipe with images that are right, but not annotated, among the negatives
    plain      `mistakes` with them among the negatives, and mined
    relabel    `plain`, and mined images that are right for the human text as its positives

Prints recalls on val after each round with the standard error over seeds, gains over
`--baselines`, paired by seed, counts and seconds. A study that is stopped goes on where it was.

    python benchmarks/study_photographs.py --data_dir data/grocery --towers towers --workers 2
    python benchmarks/study_photographs.py --rows benchmarks/results/photographs_600 --report_only
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from _study import (
    Arm,
    Job,
    Study,
    add_flags,
    conclude,
    read_flags,
    read_rows,
    run_all,
    run_arm,
    share_iteration_0,
    start_worker,
    with_parts,
    write_row,
)

from cirloop.cli import entry
from cirloop.io import parse

RECIPE = Path(__file__).resolve().parents[1] / "configs" / "grocery_clip.yaml"
NO_ANCHORS = {"num": 0}
NO_TEXTS: Arm = {
    "mining": {"strategy": {"type": "none"}, "anchors": NO_ANCHORS},
    "captioning": {"enabled": False},
}
MISTAKES: Arm = {
    "mining": {
        "strategy": {"type": "top_k", "negatives_per_query": 3, "extra_ranks": "all"},
        "anchors": NO_ANCHORS,
        "only_failed_queries": True,
    }
}
NO_JUDGE: Arm = {"foundation": {"exclude_right": False}}
PLAIN = with_parts(MISTAKES, **NO_JUDGE)
EXACT_JUDGE = {"min_probability": 0.5, "min_precision": 0.0}
"""For a judge that is never wrong: planted wrong pairs that it calls right are right by chance."""
ARMS: dict[str, Arm] = {
    "control": with_parts(
        NO_TEXTS, training={"negatives": {"type": "ranked", "first_rank": 1, "last_rank": None}}
    ),
    "far": NO_TEXTS,
    "loop": {},
    "once": {"mining": {"num_rounds": 1}},
    "many_once": {
        "mining": {
            "num_rounds": 1,
            "strategy": {
                "type": "near_reference",
                "negatives_per_query": 9,
                "candidate_pool": 200,
            },
            "anchors": {"num": 1200, "neighbors": 3, "last_rank": 200},
        }
    },
    "failed": {"captioning": {"max_round_trip_rank": 0, "min_round_trip_rank": 2}},
    "near": {"mining": {"anchors": NO_ANCHORS}},
    "mistakes": MISTAKES,
    "no_judge": NO_JUDGE,
    "plain": PLAIN,
    "relabel": with_parts(PLAIN, captioning={"relabel": EXACT_JUDGE}),
}
MEASURES = {
    "any correct recall@1": "R@1",
    "any correct recall@5": "R@5",
    "map@10": "mAP@10",
    "any correct recall@1, text alone": "R@1, text alone",
    "any correct recall@1, image alone": "R@1, image alone",
}


def settings(args: argparse.Namespace, seed: int, arm: str) -> dict[str, Any]:
    """Return the settings that all arms of a seed have in common: the recipe's."""
    recipe: dict[str, Any] = parse.read_yaml(RECIPE)
    del recipe["num_iterations"]
    recipe = with_parts(
        recipe,
        model={"path": str(args.towers.absolute())},
        data={
            "train_triplets": args.triplets,
            "subset_seed": seed,
            "eval_queries": args.eval_queries,
        },
        training={"iteration_0_steps": args.steps, "steps_per_iteration": args.steps},
        evaluation={"split": args.split, "evaluate_base": False},
        runtime={"checkpoint_every_steps": 0, "cache_dir": args.output / "cache"},
    )
    return recipe | {"data_dir": args.data_dir}


FLAGS = ("split", "triplets", "eval_queries", "rounds", "steps")
STUDY = Study("grocery", ARMS, settings, MEASURES, FLAGS)


def run_job(job: Job) -> None:
    """Run an arm in a process of its own, and write what came out."""
    args, seed, arm = job
    start_worker(args)
    write_row(job, run_arm(STUDY, args, seed, arm))


def prepare(job: Job) -> None:
    """Train iteration 0 of a seed in a process of its own."""
    args, seed, _ = job
    start_worker(args)
    share_iteration_0(STUDY, args, seed)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_flags(parser, "experiments/photographs", ",".join(ARMS))
    parser.add_argument("--data_dir", type=Path, help="the clone of GroceryStoreDataset")
    parser.add_argument("--towers", type=Path, default=Path("towers"))
    parser.add_argument("--triplets", type=int, default=600)
    parser.add_argument("--steps", type=int, default=100, help="steps of an iteration")
    parser.add_argument("--eval_queries", type=int, default=1000)
    parser.add_argument("--split", choices=("val", "test"), default="val")
    args = read_flags(parser, STUDY)
    read_rows(STUDY, args)  # before any work
    if not args.report_only:
        run_all(args, prepare, run_job)
    conclude(STUDY, args, f"grocery {args.split}, {args.triplets} human triplets")


if __name__ == "__main__":
    entry.main_wrapper(main)
