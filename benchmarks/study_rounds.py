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
    many_anchors   the same with three times as many a round
    pairs     mistakes as they are mined, rewritten, in pairs: no bundles, mined images as negatives
    oracle    the loop with true texts, from the scenes: the bound that no foundation model passes
    relabel   the loop, and mined images that the judge calls right for the human text as positives
    relabel_oracle   the same with the scenes as foundation model
    averaged  the loop's adapters, each averaged with that of the iteration before: no training
    no_bundles, no_far, again, failed, restart, one_schedule   the loop less a part, or with another
    rank_term   the loop with the mistakes as explicit negatives, in a triplet hinge beside InfoNCE

QuRe's arms have no new texts and one explicit negative a query; their control is `random_negative`:

    band, qure   from the band of scores: with InfoNCE, with QuRe's Bradley-Terry loss (divided by
                 the temperature of InfoNCE)
    qure_3, qure_6, qure_10   with sets that are defined so often in a run (`--rounds 10` or more)
    band_3, band_5   with 3 and 5 negatives a query

Prints, for each arm, recalls on `shapes` after each round with the standard error over seeds, the
gain over `control` after each round, paired by seed, texts written and accepted, and seconds. A
study that is stopped goes on where it was; `--workers` arms run at once. `--figure` draws the
recalls over the rounds.

    python benchmarks/study_rounds.py --seeds 5 --workers 2 --output experiments/rounds
    python benchmarks/study_rounds.py --output experiments/rounds --report_only --figure rounds.png
    python benchmarks/study_rounds.py --rounds 10 --steps 20 --arms random_negative,qure_3,qure_10
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file

from cirloop.artifacts import schema
from cirloop.artifacts.atomic import write_json
from cirloop.cli import entry, runner
from cirloop.config.run import RunConfig, save
from cirloop.config.run_dir import CONFIG
from cirloop.data.shapes.load import ShapesOracle
from cirloop.data.shapes.splits import FAMILY_SIZE, image_id, row_of, scenes_of, split_name
from cirloop.monitoring.console import table
from cirloop.report.charts import PAPER, STYLE
from cirloop.types import Query, UserError

Arm = dict[str, dict[str, Any]]

TOP_K = {"type": "top_k", "negatives_per_query": 3, "extra_ranks": "all"}
NO_MINING: Arm = {"mining": {"strategy": {"type": "none"}}, "captioning": {"enabled": False}}
RANDOM_NEGATIVES = {"type": "ranked", "first_rank": 1, "last_rank": None}
FAR_NEGATIVES = {"type": "ranked", "first_rank": 11, "last_rank": 60}
BUNDLES = {"size": 4}
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


def with_parts(arm: Arm, **parts: dict[str, Any]) -> Arm:
    """Return an arm with other settings of some parts."""
    return {name: {**arm.get(name, {}), **parts.get(name, {})} for name in {*arm, *parts}}


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
    "many_anchors": with_parts(LOOP, mining={"anchors": {"num": 390}}),
    "pairs": {"mining": {"strategy": TOP_K}},
    "no_bundles": with_parts(LOOP, training={"bundles": {"size": 0}}),
    "no_far": with_parts(LOOP, training={"negatives": RANDOM_NEGATIVES}),
    "again": with_parts(LOOP, mining={"skip_captioned": False}),
    "failed": with_parts(LOOP, captioning={"max_round_trip_rank": 0, "min_round_trip_rank": 2}),
    "restart": with_parts(LOOP, training={"start_from": "iteration_0"}),
    "one_schedule": with_parts(LOOP, training={"lr_span": "run"}),
    "oracle": LOOP,
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
EQUAL_TEXTS = ("near", "random")
"""Arms that get as many accepted texts in a round as `loop` has on average."""
RECALLS = ("recall@1", "recall@5", "any correct recall@1")
ACROSS = "best image of another family"
UNLABELED = "right among the best 10, but not the target"
MEASURES = (*RECALLS, ACROSS, UNLABELED)
SHORT_NAMES = ("R@1", "R@5", "any-correct R@1", ACROSS, UNLABELED)


def config(
    args: argparse.Namespace,
    seed: int,
    directory: Path,
    rounds: int,
    arm: str,
    **parts: dict[str, Any],
) -> RunConfig:
    """Return the settings of an arm, with other `parts`."""
    settings: dict[str, Any] = {
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
    settings = with_parts(with_parts(settings, **ARMS[arm]), **parts)
    if arm in EQUAL_TEXTS and rounds:
        loop = json.loads((args.output / f"row_loop_{seed}.json").read_text())
        settings["captioning"]["max_per_iteration"] = max(1, loop["accepted"] // rounds)
    return RunConfig(
        experiment_dir=directory, seed=seed, num_iterations=rounds, auto_resume=True, **settings
    )


def share_iteration_0(args: argparse.Namespace, seed: int) -> Path:
    """Train iteration 0 of a seed; return its run directory."""
    directory: Path = args.output / f"warm_{seed}"
    runner.run(config(args, seed, directory, 0, "control"))
    return directory


def run_arm(args: argparse.Namespace, seed: int, arm: str) -> dict[str, Any]:
    """Run an arm from the seed's iteration 0; return its recalls after each round, and counts."""
    warm = share_iteration_0(args, seed)
    directory = args.output / f"{arm}_{seed}"
    began = time.monotonic()
    parts: Arm = {}
    if "loss" in ARMS[arm].get("training", {}):  # iteration 0 had another
        adapter = str(warm / "checkpoint_iter_0")
        parts = {"model": {"start_adapter": adapter}, "training": {"iteration_0_steps": 0}}
    elif not directory.exists():
        aside = args.output / f".{arm}_{seed}"
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(warm, aside)
        # it stays the run of its manifest
        save(config(args, seed, directory, args.rounds, arm), aside / CONFIG)
        aside.rename(directory)
    results = runner.run(config(args, seed, directory, args.rounds, arm, **parts))
    accounts = [json.loads(p.read_text()) for p in sorted(directory.glob("accounting_iter_*.json"))]
    counts = ("mined", "false_negatives", "accepted", "true_captions")
    samples = sorted(directory.glob("augmented_samples_iter_*.json"))
    written = [json.loads(path.read_text())["summary"]["candidates"] for path in samples]
    return {
        "arm": arm,
        "seed": seed,
        "split": split_name(args.split, args.variant),
        "recalls": {
            **{name: [100 * r["metrics"][name] for r in results] for name in RECALLS},
            **best_images([directory / f"evaluation_iter_{t}.json" for t in range(len(results))]),
        },
        **{name: sum(account[name] for account in accounts) for name in counts},
        "written": sum(written),
        "seconds": round(time.monotonic() - began, 1),
        "costs": costs_of_stages(directory),
    }


def costs_of_stages(directory: Path) -> dict[str, dict[str, float]]:
    """Return seconds and, of a run with `--profile`, FLOPs of each kind of stage, those of
    iteration 0 too, over all attempts."""
    total: dict[str, dict[str, float]] = {}
    for cost in schema.read(directory / "costs.json")["stages"]:
        kind = schema.kind_of(cost["stage"].removesuffix(".json") + ".json")
        spent = total.setdefault(kind, {"seconds": 0.0, "flops": 0.0})
        for unit in spent:
            spent[unit] = round(spent[unit] + cost[unit], 1)
    return total


def run_averaged(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Evaluate the mean of the LoRA weights of each two successive iterations of `loop`."""
    row = json.loads((args.output / f"row_loop_{seed}.json").read_text())
    began = time.monotonic()
    recalls = {name: [row["recalls"][name][0]] for name in MEASURES}
    for t in range(1, args.rounds + 1):
        run = args.output / f"averaged_{seed}_{t}"
        adapter = args.output / f"averaged_{seed}_{t}_adapter"
        average(
            [args.output / f"loop_{seed}" / f"checkpoint_iter_{u}" for u in (t - 1, t)], adapter
        )
        parts = {"model": {"start_adapter": str(adapter)}, "training": {"iteration_0_steps": 0}}
        [result] = runner.run(config(args, seed, run, 0, "control", **parts))
        for name in RECALLS:
            recalls[name].append(100 * result["metrics"][name])
        for name, [value] in best_images([run / "evaluation_iter_0.json"]).items():
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


def write_row(job: tuple[argparse.Namespace, int, str]) -> None:
    """Run an arm in a process of its own, and write what came out."""
    args, seed, arm = job
    torch.set_num_threads(args.threads)
    logging.getLogger("cirloop").setLevel(logging.WARNING)
    row = run_averaged(args, seed) if arm == "averaged" else run_arm(args, seed, arm)
    write_json(args.output / f"row_{arm}_{seed}.json", row)
    print(f"{arm}, seed {seed}: done", flush=True)


def run_all(args: argparse.Namespace) -> None:
    """Run what has no row yet; of a seed, iteration 0 first, and `loop` before what needs it."""
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    jobs = [
        (args, seed, arm)
        for seed in seeds
        for arm in args.arms.split(",")
        if not (args.output / f"row_{arm}_{seed}.json").exists()
    ]
    context = get_context("spawn")
    with ProcessPoolExecutor(args.workers, mp_context=context) as pool:
        for _ in pool.map(prepare, [(args, seed) for seed in {job[1] for job in jobs}]):
            pass
        later = [job for job in jobs if job[2] in (*EQUAL_TEXTS, "averaged")]
        for part in ([job for job in jobs if job not in later], later):
            for _ in pool.map(write_row, part):
                pass


def prepare(job: tuple[argparse.Namespace, int]) -> None:
    """Train iteration 0 of a seed in a process of its own."""
    args, seed = job
    torch.set_num_threads(args.threads)
    logging.getLogger("cirloop").setLevel(logging.WARNING)
    share_iteration_0(args, seed)


def mean_se(values: list[float]) -> str:
    """Return the mean and its standard error."""
    spread = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{np.mean(values):.1f} ± {spread:.1f}"


def report(rows: list[dict[str, Any]], rounds: int, split: str) -> None:
    """Print recalls, gains over `control` and counts of the seeds that all arms have."""
    by = {(row["arm"], row["seed"]): row for row in rows}
    arms = [arm for arm in ARMS if arm in {row["arm"] for row in rows}]
    seeds = sorted({r["seed"] for r in rows if all((arm, r["seed"]) in by for arm in arms)})
    title = f"shapes {split}, {len(seeds)} seeds, mean ± standard error over seeds"
    rounds_shown = [f"round {t}" for t in range(1, rounds + 1)]
    for name, short in zip(MEASURES, SHORT_NAMES, strict=True):
        recalls = []
        gains = []
        for arm in arms:
            ours_SR = [by[arm, seed]["recalls"][name] for seed in seeds]
            recalls.append([arm, *(mean_se([r[t] for r in ours_SR]) for t in range(rounds + 1))])
            if arm == "control" or "control" not in arms:
                continue
            theirs_SR = [by["control", seed]["recalls"][name] for seed in seeds]
            differences_SR = np.array(ours_SR) - np.array(theirs_SR)
            gains.append([arm, *(mean_se(list(each)) for each in differences_SR.T[1:])])
        table(f"{short}, {title}", ("arm", "iteration 0", *rounds_shown), recalls)
        if gains:
            table(f"{short}: gain over control, paired by seed", ("arm", *rounds_shown), gains)
    table(f"counts per seed, {title}", COUNTS, [counts_of(a, by, seeds) for a in arms])
    costs = [costs_row(arm, [by[arm, seed] for seed in seeds]) for arm in arms]
    table(f"cost, mean over {len(seeds)} seeds of shapes {split}", COSTS, costs)


def draw(rows: list[dict[str, Any]], rounds: int, title: str, file: Path) -> None:
    """Draw R@1 and R@5 of each arm over the rounds, with standard errors over its seeds."""
    arms = [arm for arm in ARMS if arm in {row["arm"] for row in rows}]
    with matplotlib.rc_context(STYLE):
        figure = Figure((9.6, 4.4), layout="constrained", facecolor=PAPER)
        for axes, name, short in zip(figure.subplots(1, 2), RECALLS, SHORT_NAMES, strict=False):
            for arm in arms:
                recalls_SR = np.array([row["recalls"][name] for row in rows if row["arm"] == arm])
                seeds = len(recalls_SR)
                errors_R = recalls_SR.std(0, ddof=1) / seeds**0.5 if seeds > 1 else None
                label = f"{arm}, {seeds} seeds"
                axes.errorbar(range(rounds + 1), recalls_SR.mean(0), errors_R, label=label)
            axes.set_title(f"{short}, {title}")
            axes.set_xlabel("round")
            axes.set_xticks(range(rounds + 1))
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=3)
        figure.savefig(file, dpi=100)


STAGES = {
    "checkpoint": "training",
    "hard_negatives": "mining",
    "augmented_samples": "captioning",
    "ranked_negatives": "ranking negatives",
    "evaluation": "evaluation",
}
COSTS = ("arm", *(f"{name}, s" for name in STAGES.values()), "all, s", "all, TFLOP")


def costs_row(arm: str, rows: list[dict[str, Any]]) -> list[str]:
    """Return an arm's mean seconds by kind of stage, and FLOPs of all. Training of iteration 0 is
    included but in arms with a loss of their own, which begin with its adapter."""
    costs = [row["costs"] for row in rows]
    seconds = [
        np.mean([cost.get(stage, {}).get("seconds", 0.0) for cost in costs]) for stage in STAGES
    ]
    flops = np.mean([sum(spent["flops"] for spent in cost.values()) for cost in costs])
    shown = f"{flops / 1e12:.1f}" if flops else ""
    return [arm, *(f"{value:.0f}" for value in seconds), f"{sum(seconds):.0f}", shown]


COUNTS = ("arm", "mined", "right answers", "texts written", "accepted", "true", "seconds")


def counts_of(arm: str, by: dict[tuple[str, int], dict[str, Any]], seeds: list[int]) -> list[str]:
    """Return a row of counts of an arm."""
    rows = [by[arm, seed] for seed in seeds]

    def total(name: str) -> int:
        return int(sum(row[name] for row in rows))

    def share(part: str, whole: str) -> str:
        return f"{100 * total(part) / total(whole):.1f}%" if total(whole) else ""

    return [
        arm,
        f"{total('mined') / len(rows):.0f}",
        share("false_negatives", "mined"),
        f"{total('written') / len(rows):.0f}",
        f"{total('accepted') / len(rows):.0f}",
        share("true_captions", "accepted"),
        f"{total('seconds') / len(rows):.0f}",
    ]


def read_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the finished rows of this study. Raises UserError for those of another."""
    split = split_name(args.split, args.variant)
    rows = []
    for path in sorted(args.output.glob("row_*.json")):
        row = json.loads(path.read_text())
        if row.get("split") != split or not row["recalls"].keys() >= {*MEASURES}:
            raise UserError(
                f"{path} is not of {split}, or of an earlier version of this study. Give another"
                " --output; a row of an earlier version can be deleted, and is made anew."
            )
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("experiments/rounds"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first_seed", type=int, default=1)
    parser.add_argument("--arms", default="control,far,loop,near,random,once,anchors")
    parser.add_argument("--rounds", type=int, default=3)
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
    parser.add_argument("--workers", type=int, default=1, help="arms that run at once")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of an arm")
    parser.add_argument("--profile", action="store_true", help="count FLOPs too")
    parser.add_argument("--report_only", action="store_true")
    parser.add_argument("--figure", type=Path, help="draw the recalls to this file")
    args = parser.parse_args(sys.argv[1:])
    args.output = args.output.absolute()
    args.output.mkdir(parents=True, exist_ok=True)
    read_rows(args)  # before any work
    if not args.report_only:
        run_all(args)
    split = split_name(args.split, args.variant)
    rows = read_rows(args)
    report(rows, args.rounds, split)
    if args.figure:
        title = f"shapes {split}, {args.triplets} human triplets"
        draw(rows, args.rounds, title, args.figure)


if __name__ == "__main__":
    entry.main_wrapper(main)
