"""Do rounds pay? The loop against controls that could explain its gain away, over seeds.

Arms of a seed share iteration 0 and spend the same optimisation steps, with as many rows and, but
for `pairs`, as many explicit negatives in a batch:

    control   human triplets, random images as explicit negatives
    far       human triplets, explicit negatives from ranks 11 to 60
    loop      mistakes mined anew in each round and rewritten, bundles, far negatives
    near      images near the reference instead of mistakes, at most as many texts as the loop's
    random    random images instead of mistakes, at most as many texts
    once      mined and captioned in the first round alone
    anchors   the loop, and self-made anchors: references that no human wrote a text for
    anchors_once   the same, in the first round alone
    many_anchors_once   three times as many anchors, in the first round alone: with 100 triplets
              about as many texts as `anchors` has after three rounds, all by the first model
    many_failed_once   that, with the texts of `failed`
    affirmed  `anchors` with all texts that the judge affirms, whatever the model finds by them
    many_failed   three times as many anchors in each round, with the texts of `failed`
    failed_no_mistakes   `failed` with anchors alone
    more_anchors_once   610 anchors in the first round alone: that with 400 triplets
    pairs     mistakes as they are mined, rewritten, in pairs: no bundles, mined images as negatives
    oracle    `anchors` with true texts, from the scenes: a bound that no foundation model passes
    relabel   the loop, and mined images that the judge calls right for the human text as positives
    relabel_oracle   the same with the scenes as foundation model
    averaged  the loop's adapters, each averaged with that of the iteration before: no training
    no_mistakes, no_bundles, no_far, again, failed, restart, one_schedule   `anchors` less a part,
              or with another
    rank_term   the loop with the mistakes as explicit negatives, in a triplet hinge beside InfoNCE

QuRe's arms have no new texts and one explicit negative a query; their control is `random_negative`:

    band, qure   from the band of scores: with InfoNCE, with QuRe's Bradley-Terry loss (divided by
                 the temperature of InfoNCE)
    qure_3, qure_6, qure_10   with sets that are defined so often in a run (`--rounds 10` or more)
    band_3, band_5   with 3 and 5 negatives a query

Prints, for each arm, recalls on `shapes` after each round with the standard error over seeds, the
gain over `control` after each round, paired by seed, texts written and accepted, and seconds. A
study that is stopped goes on where it was; `--workers` arms run at once. `--figure` draws the
recalls of `--arms` over the rounds. One JSON file per arm and seed, under `--rows`, holds what is
printed: those of the documented studies are in `benchmarks/results/`, and more seeds are added to
them.

    python benchmarks/study_rounds.py --seeds 5 --workers 2 --output experiments/rounds
    python benchmarks/study_rounds.py --rows benchmarks/results/rounds_400 --report_only
    python benchmarks/study_rounds.py --rounds 10 --steps 20 --arms random_negative,qure_3,qure_10
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _study import (
    Arm,
    Job,
    Study,
    add_flags,
    conclude,
    config,
    measured,
    read_flags,
    read_rows,
    row_path,
    run_all,
    run_arm,
    share_iteration_0,
    start_worker,
    with_parts,
    write_row,
)
from safetensors.torch import load_file, save_file

from cirloop.cli import entry, runner
from cirloop.data.shapes.load import ShapesOracle
from cirloop.data.shapes.splits import FAMILY_SIZE, image_id, row_of, scenes_of, split_name
from cirloop.types import Query

TOP_K = {"type": "top_k", "negatives_per_query": 3, "extra_ranks": "all"}
NO_MINING: Arm = {"mining": {"strategy": {"type": "none"}}, "captioning": {"enabled": False}}
RANDOM_NEGATIVES = {"type": "ranked", "first_rank": 1, "last_rank": None}
FAR_NEGATIVES = {"type": "ranked", "first_rank": 11, "last_rank": 60}
BUNDLES = {"size": 4}
FAILED = {"max_round_trip_rank": 0, "min_round_trip_rank": 2}
"""Texts that the judge affirms, and by which the current model does not rank the image first."""
RELABEL = {"relabel": {"min_probability": 0.5}}
LOOP: Arm = {
    "mining": {"strategy": TOP_K, "skip_captioned": True},
    "training": {"negatives": FAR_NEGATIVES, "bundles": BUNDLES},
}


BAND = {"type": "band"}
BRADLEY_TERRY = {"type": "bradley_terry", "temperature": 0.05}
RANK_TERM = {
    "type": "sum",
    "parts": [
        {"loss": {"type": "info_nce", "temperature": 0.05}},
        {"loss": {"type": "triplet", "margin": 0.1}, "weight": 2.0},
    ],
}


def without_texts(strategy: dict[str, Any], num: int = 1, **training: Any) -> Arm:
    """Return an arm that trains with `num` mined images a query as negatives, for all queries."""
    return {
        "mining": {
            "strategy": {**strategy, "negatives_per_query": num},
            "only_failed_queries": False,
        },
        "captioning": {"enabled": False},
        "training": {"negatives_in_batch": num, **training},
    }


ANCHORS: Arm = with_parts(LOOP, mining={"anchors": {"num": 130}})
ARMS: dict[str, Arm] = {
    "control": with_parts(NO_MINING, training={"negatives": RANDOM_NEGATIVES}),
    "far": with_parts(NO_MINING, training={"negatives": FAR_NEGATIVES}),
    "loop": LOOP,
    "near": with_parts(
        LOOP, mining={"strategy": {"type": "near_reference", "negatives_per_query": 3}}
    ),
    "random": with_parts(
        LOOP,
        mining={
            "strategy": {"type": "random", "negatives_per_query": 3},
            "only_failed_queries": False,
        },
    ),
    "once": with_parts(LOOP, mining={"num_rounds": 1}),
    "anchors": ANCHORS,
    "anchors_once": with_parts(ANCHORS, mining={"num_rounds": 1}),
    "many_anchors_once": with_parts(LOOP, mining={"anchors": {"num": 390}, "num_rounds": 1}),
    "more_anchors_once": with_parts(LOOP, mining={"anchors": {"num": 610}, "num_rounds": 1}),
    "pairs": {"mining": {"strategy": TOP_K}},
    "no_mistakes": with_parts(ANCHORS, mining={"strategy": {"type": "none"}}),
    "no_bundles": with_parts(ANCHORS, training={"bundles": {"size": 0}}),
    "no_far": with_parts(ANCHORS, training={"negatives": RANDOM_NEGATIVES}),
    "again": with_parts(ANCHORS, mining={"skip_captioned": False}),
    "affirmed": with_parts(ANCHORS, captioning={"max_round_trip_rank": 0}),
    "failed": with_parts(ANCHORS, captioning=FAILED),
    "many_failed_once": with_parts(
        LOOP, mining={"anchors": {"num": 390}, "num_rounds": 1}, captioning=FAILED
    ),
    "many_failed": with_parts(LOOP, mining={"anchors": {"num": 390}}, captioning=FAILED),
    "failed_no_mistakes": with_parts(
        ANCHORS, mining={"strategy": {"type": "none"}}, captioning=FAILED
    ),
    "restart": with_parts(ANCHORS, training={"start_from": "iteration_0"}),
    "one_schedule": with_parts(ANCHORS, training={"lr_span": "run"}),
    "oracle": ANCHORS,
    "averaged": LOOP,
    "relabel_oracle": with_parts(LOOP, captioning=RELABEL),
    "relabel": with_parts(LOOP, captioning=RELABEL),
    "negatives": {"mining": {"strategy": TOP_K}, "captioning": {"enabled": False}},
    "rank_term": with_parts(LOOP, training={"negatives": {"type": "mined"}, "loss": RANK_TERM}),
    "random_negative": without_texts({"type": "random", "negatives_per_query": 1}),
    "band": without_texts(BAND),
    "band_3": without_texts(BAND, num=3),
    "band_5": without_texts(BAND, num=5),
    "qure": without_texts(BAND, loss=BRADLEY_TERRY),
    **{f"qure_{n}": without_texts(BAND | {"n_def": n}, loss=BRADLEY_TERRY) for n in (3, 6, 10)},
}
TRUTH = {"type": "catalogue"}
RECALLS = {"recall@1": "R@1", "recall@5": "R@5", "any correct recall@1": "any-correct R@1"}
ACROSS = "best image of another family"
UNLABELED = "right among the best 10, but not the target"


def settings(args: argparse.Namespace, seed: int, arm: str) -> dict[str, Any]:
    """Return the settings that all arms of a seed have in common."""
    return {
        "model": {"path": "tiny", "dtype": "float32"},
        "foundation": TRUTH if "oracle" in arm else {"path": "tiny", "dtype": "float32"},
        "data": {
            "train_families": args.families,
            "train_triplets": args.triplets,
            "eval_families": args.eval_families,
            "subset_seed": seed,
            "variant": args.variant,
        },
        "training": {
            "iteration_0_steps": args.warm_up,
            "steps_per_iteration": args.steps,
            "batch_size": args.batch_size,
            "loss": {"temperature": args.temperature},
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
            "profile": args.profile,
            "cache_dir": args.output / "cache",
        },
    }


def best_images(evaluations: list[Path]) -> dict[str, list[float]]:
    """Return, per evaluation, two percentages: of queries whose best image is of another family
    than the reference, in which no image is right; and of the best 10 images, of those that are
    right without being the annotated target."""
    out: dict[str, list[float]] = {ACROSS: [], UNLABELED: []}
    for path in evaluations:
        evaluation = json.loads(path.read_text())
        scenes = scenes_of(evaluation["split"].removeprefix("shapes_"))
        oracle = ShapesOracle(scenes, len(scenes.scenes))
        wrong = []
        unlabeled = []
        for (query, *_), best in zip(evaluation["ranks"], evaluation["top"], strict=True):
            drawn = scenes.queries[int(query.rpartition("-")[2])]
            reference = image_id(scenes.split, drawn.reference)
            right = oracle.positives(Query(query, reference, drawn.text))
            right -= {image_id(scenes.split, drawn.target)}
            wrong.append(row_of(best[0]) // FAMILY_SIZE != drawn.reference // FAMILY_SIZE)
            unlabeled.append(len(right & {*best}) / len(best))
        out[ACROSS].append(100 * float(np.mean(wrong)))
        out[UNLABELED].append(100 * float(np.mean(unlabeled)))
    return out


FLAGS = (
    *("split", "variant", "triplets", "families", "eval_families"),
    *("rounds", "warm_up", "steps", "batch_size", "temperature"),
)
STUDY = Study(
    "shapes",
    ARMS,
    settings,
    RECALLS | {ACROSS: ACROSS, UNLABELED: UNLABELED},
    FLAGS,
    best_images,
    equal_texts=("near", "random"),
)


def run_averaged(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Evaluate the mean of the LoRA weights of each two successive iterations of `loop`."""
    row = json.loads(row_path(args, "loop", seed).read_text())
    began = time.monotonic()
    recalls = {name: [row["recalls"][name][0]] for name in STUDY.measures}
    for t in range(1, args.rounds + 1):
        run = args.output / f"averaged_{seed}_{t}"
        adapter = args.output / f"averaged_{seed}_{t}_adapter"
        average(
            [args.output / f"loop_{seed}" / f"checkpoint_iter_{u}" for u in (t - 1, t)], adapter
        )
        parts = {"model": {"start_adapter": str(adapter)}, "training": {"iteration_0_steps": 0}}
        results = runner.run(config(STUDY, args, seed, run, 0, "control", **parts))
        for name, [value] in measured(STUDY, results, run).items():
            recalls[name].append(value)
    seconds = round(time.monotonic() - began, 1)
    return {**row, "arm": "averaged", "recalls": recalls, "seconds": seconds}


def average(adapters: list[Path], to: Path) -> None:
    """Write an adapter whose weights are the mean of those of `adapters`."""
    weights = [load_file(adapter / "adapter_model.safetensors") for adapter in adapters]
    means = {name: torch.stack([w[name] for w in weights]).mean(0) for name in weights[0]}
    to.mkdir(exist_ok=True)
    shutil.copy(adapters[0] / "adapter_config.json", to)
    save_file(means, to / "adapter_model.safetensors")


def run_job(job: Job) -> None:
    """Run an arm in a process of its own, and write what came out."""
    args, seed, arm = job
    start_worker(args)
    row = run_averaged(args, seed) if arm == "averaged" else run_arm(STUDY, args, seed, arm)
    write_row(job, row)


def prepare(job: Job) -> None:
    """Train iteration 0 of a seed in a process of its own."""
    args, seed, _ = job
    start_worker(args)
    share_iteration_0(STUDY, args, seed)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_flags(parser, "experiments/rounds", "control,far,loop,near,random,once,anchors")
    parser.add_argument("--families", type=int, default=100)
    parser.add_argument("--triplets", type=int, default=400)
    parser.add_argument("--eval_families", type=int, default=182)
    parser.add_argument("--warm_up", type=int, default=60, help="steps of iteration 0")
    parser.add_argument("--steps", type=int, default=60, help="steps of a later iteration")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--temperature", type=float, default=0.05)
    parser.add_argument(
        "--split", choices=("val", "test"), default="test", help="choose settings on val"
    )
    parser.add_argument(
        "--variant", type=int, choices=(1, 2), default=1, help="2: other scenes, look and sentences"
    )
    parser.add_argument("--profile", action="store_true", help="count FLOPs too")
    args = read_flags(parser, STUDY)
    read_rows(STUDY, args)  # before any work
    if not args.report_only:
        run_all(args, prepare, run_job, later=(*STUDY.equal_texts, "averaged"))
    split = split_name(args.split, args.variant)
    conclude(STUDY, args, f"shapes {split}, {args.triplets} human triplets")


if __name__ == "__main__":
    entry.main_wrapper(main)
