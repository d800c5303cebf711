"""Arms of a study that begin with one iteration 0, several at once, over seeds: one file of results
each, tables and a figure of them. Shared by `study_rounds.py` and `study_photographs.py`; not a
benchmark itself."""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

from cirloop.artifacts import schema
from cirloop.artifacts.atomic import write_json
from cirloop.cli import runner
from cirloop.config.run import RunConfig, save
from cirloop.config.run_dir import CONFIG
from cirloop.evaluation.significance import over_runs
from cirloop.loop import RESULTS
from cirloop.monitoring.console import table
from cirloop.report.charts import PAPER, STYLE
from cirloop.types import UserError

Arm = dict[str, dict[str, Any]]
Job = tuple[argparse.Namespace, int, str]
"""Flags, a seed and an arm."""
COUNTED = ("mined", "false_negatives", "accepted", "true_captions")


def no_more(evaluations: list[Path]) -> dict[str, list[float]]:
    """Return no further measures of evaluations."""
    return {}


@dataclass(frozen=True)
class Study:
    """Arms, and what is measured of them."""

    name: str
    arms: Mapping[str, Arm]
    settings: Callable[[argparse.Namespace, int, str], dict[str, Any]]
    """The settings that an arm changes, by flags, seed and arm."""
    measures: Mapping[str, str]
    """Headings, by metric of an evaluation or further measure."""
    flags: tuple[str, ...]
    """Flags that the rows of one table have in common."""
    more: Callable[[list[Path]], dict[str, list[float]]] = no_more
    """Further measures, in percent, of evaluation_iter_{t}.json."""
    equal_texts: tuple[str, ...] = ()
    """Arms that get as many accepted texts in a round as `loop` has on average."""


def with_parts(arm: Arm, **parts: dict[str, Any]) -> Arm:
    """Return an arm with other settings of some parts."""
    return arm | {name: {**arm.get(name, {}), **part} for name, part in parts.items()}


def config(
    study: Study,
    args: argparse.Namespace,
    seed: int,
    directory: Path,
    rounds: int,
    arm: str,
    **parts: dict[str, Any],
) -> RunConfig:
    """Return the settings of an arm, with other `parts`."""
    settings = with_parts(with_parts(study.settings(args, seed, arm), **study.arms[arm]), **parts)
    if arm in study.equal_texts and rounds:
        loop = json.loads(row_path(args, "loop", seed).read_text())
        settings = with_parts(
            settings, captioning={"max_per_iteration": max(1, loop["accepted"] // rounds)}
        )
    return RunConfig(
        experiment_dir=directory, seed=seed, num_iterations=rounds, auto_resume=True, **settings
    )


def study_of(study: Study, args: argparse.Namespace) -> dict[str, Any]:
    """Return the flags of a study, with the version of the code."""
    return {**{name: getattr(args, name) for name in study.flags}, "commit": commit()}


def commit() -> str:
    """Return the commit of this checkout, with a + where files differ; "" outside one."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*", "--abbrev=12"]
    here = Path(__file__).parent
    return subprocess.run(command, cwd=here, capture_output=True, text=True).stdout.strip()


def row_path(args: argparse.Namespace, arm: str, seed: int) -> Path:
    """Return the file of an arm's results with a seed."""
    return Path(args.rows) / f"row_{arm}_{seed}.json"


def share_iteration_0(study: Study, args: argparse.Namespace, seed: int) -> Path:
    """Train iteration 0 of a seed; return its run directory."""
    directory: Path = args.output / f"warm_{seed}"
    runner.run(config(study, args, seed, directory, 0, "control"))
    return directory


def run_arm(study: Study, args: argparse.Namespace, seed: int, arm: str) -> dict[str, Any]:
    """Run an arm from the seed's iteration 0, or its own where its foundation model knows other
    right answers; return its recalls after each round, and counts."""
    warm: Path = args.output / f"warm_{seed}"
    if not (warm / RESULTS).exists():  # of a finished run another arm may be reading
        share_iteration_0(study, args, seed)
    directory = args.output / f"{arm}_{seed}"
    began = time.monotonic()
    parts: Arm = {}
    if "loss" in study.arms[arm].get("training", {}):  # iteration 0 had another
        adapter = str(warm / "checkpoint_iter_0")
        parts = {"model": {"start_adapter": adapter}, "training": {"iteration_0_steps": 0}}
    elif not directory.exists() and "foundation" not in study.arms[arm]:
        copied = args.output / f".{arm}_{seed}"
        shutil.rmtree(copied, ignore_errors=True)
        shutil.copytree(warm, copied)
        # it stays the run of its manifest
        save(config(study, args, seed, directory, args.rounds, arm), copied / CONFIG)
        copied.rename(directory)
    results = runner.run(config(study, args, seed, directory, args.rounds, arm, **parts))
    accounts = [json.loads(p.read_text()) for p in sorted(directory.glob("accounting_iter_*.json"))]
    samples = sorted(directory.glob("augmented_samples_iter_*.json"))
    written = [json.loads(path.read_text())["summary"]["candidates"] for path in samples]
    return {
        "arm": arm,
        "seed": seed,
        "study": study_of(study, args),
        "recalls": measured(study, results, directory),
        **{name: sum(account[name] for account in accounts) for name in COUNTED},
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
            spent[unit] = round(spent[unit] + cost.get(unit, 0.0), 1)  # none of a killed attempt
    return total


def measured(
    study: Study, results: Sequence[Mapping[str, Any]], directory: Path
) -> dict[str, list[float]]:
    """Return the study's measures after each round, in percent."""
    more = study.more([directory / f"evaluation_iter_{t}.json" for t in range(len(results))])
    return more | {
        name: [100 * result["metrics"][name] for result in results]
        for name in study.measures
        if name not in more
    }


def start_worker(args: argparse.Namespace) -> None:
    """Prepare a process that runs arms."""
    torch.set_num_threads(args.threads)
    logging.getLogger("cirloop").setLevel(logging.WARNING)


def write_row(job: Job, row: Mapping[str, Any]) -> None:
    """Write an arm's results."""
    args, seed, arm = job
    write_json(row_path(args, arm, seed), row)
    print(f"{arm}, seed {seed}: done", flush=True)


def run_all(
    args: argparse.Namespace,
    prepare: Callable[[Job], None],
    run: Callable[[Job], None],
    later: Sequence[str] = (),
) -> None:
    """Run what has no row yet, in processes: of a seed, iteration 0 first (`prepare`), and `later`
    arms after the others, which they need."""
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    jobs = [
        (args, seed, arm)
        for seed in seeds
        for arm in args.arms.split(",")
        if not row_path(args, arm, seed).exists()
    ]
    first_of_seed = {seed: (args, seed, "control") for _, seed, _ in jobs}
    context = get_context("spawn")
    with ProcessPoolExecutor(args.workers, mp_context=context) as pool:
        for _ in pool.map(prepare, first_of_seed.values()):
            pass
        for part in (
            [job for job in jobs if job[2] not in later],
            [job for job in jobs if job[2] in later],
        ):
            for _ in pool.map(run, part):
                pass


def mean_se(values: Sequence[float]) -> str:
    """Return the mean over seeds and, of several, its standard error."""
    mean = over_runs(values)
    return f"{mean.value:.1f} ± {mean.se:.1f}" if len(values) > 1 else f"{mean.value:.1f}"


def mean_row(arm: str, values: Sequence[np.ndarray]) -> list[str]:
    """Return a row of means over seeds, of values by round for each seed."""
    return [arm, str(len(values)), *map(mean_se, np.array(values).T)]


def report(
    study: Study, rows: list[dict[str, Any]], rounds: int, baselines: Sequence[str] = ("control",)
) -> None:
    """Print recalls, gains over `baselines` and counts of each arm, over the seeds that it has."""
    by = {(row["arm"], row["seed"]): row for row in rows}
    arms = [arm for arm in study.arms if arm in {row["arm"] for row in rows}]
    seeds = {arm: sorted(seed for other, seed in by if other == arm) for arm in arms}
    title = f"{study.name}, mean ± standard error over seeds"
    rounds_shown = [f"round {t}" for t in range(1, rounds + 1)]
    for name, short in study.measures.items():
        recalls = {key: np.array(row["recalls"][name]) for key, row in by.items()}
        means = [mean_row(arm, [recalls[arm, seed] for seed in seeds[arm]]) for arm in arms]
        table(f"{short}, {title}", ("arm", "seeds", "iteration 0", *rounds_shown), means)
        for baseline in baselines:
            gains = [
                mean_row(arm, [recalls[arm, s][1:] - recalls[baseline, s][1:] for s in paired])
                for arm in arms
                if arm != baseline and (paired := [s for s in seeds[arm] if (baseline, s) in by])
            ]
            if gains:
                title_of_gains = f"{short}: gain over {baseline}, paired by seed"
                table(title_of_gains, ("arm", "seeds", *rounds_shown), gains)
    counts = [counts_of(arm, by, seeds[arm]) for arm in arms]
    table(f"counts per seed, {title}", COUNTS, counts)
    of_texts = [
        gains_of_texts(
            study, arm, baselines[0], by, [s for s in seeds[arm] if (baselines[0], s) in by]
        )
        for arm in arms
    ]
    if any(of_texts):
        columns = ("arm", *(f"{m}, {of}" for m in shown(study).values() for of in TEXTS))
        table(
            f"gain over {baselines[0]} after the last round, for each 100 texts",
            columns,
            [gains for gains in of_texts if gains],
        )
    costs = [costs_row(arm, [by[arm, seed] for seed in seeds[arm]]) for arm in arms]
    table(f"cost, {study.name}, mean over the seeds", COSTS, costs)


TEXTS = ("accepted", "written")


def shown(study: Study) -> dict[str, str]:
    """Return the headings of the two measures that are drawn, by name."""
    return dict([*study.measures.items()][:2])


def gains_of_texts(
    study: Study,
    arm: str,
    baseline: str,
    by: dict[tuple[str, int], dict[str, Any]],
    seeds: list[int],
) -> list[str]:
    """Return a row of an arm's gains after the last round for each 100 texts: trained on, and
    written; none for an arm without texts, or the baseline."""
    totals = [sum(by[arm, seed][of] for seed in seeds) for of in TEXTS]
    if arm == baseline or not all(totals):
        return []
    gains = [
        sum(by[arm, s]["recalls"][m][-1] - by[baseline, s]["recalls"][m][-1] for s in seeds)
        for m in shown(study)
    ]
    return [arm, *(f"{100 * gain / total:.2f}" for gain in gains for total in totals)]


def draw(study: Study, rows: list[dict[str, Any]], args: argparse.Namespace, title: str) -> None:
    """Draw the first two measures of `--arms` over the rounds, with standard errors."""
    arms = [arm for arm in args.arms.split(",") if arm in {row["arm"] for row in rows}]
    with matplotlib.rc_context(STYLE):
        figure = Figure((9.6, 4.4), layout="constrained", facecolor=PAPER)
        measures = shown(study).items()
        for axes, (name, short) in zip(figure.subplots(1, 2), measures, strict=True):
            for arm in arms:
                recalls_SR = np.array([row["recalls"][name] for row in rows if row["arm"] == arm])
                label = f"{arm}, {len(recalls_SR)} seeds"
                means = [over_runs(recalls_S) for recalls_S in recalls_SR.T]
                errors = [mean.se for mean in means] if len(recalls_SR) > 1 else None
                values = [mean.value for mean in means]
                axes.errorbar(range(args.rounds + 1), values, errors, label=label)
            axes.set_title(f"{short}, {title}")
            axes.set_xlabel("round")
            axes.set_xticks(range(args.rounds + 1))
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=3)
        figure.savefig(args.figure, dpi=100)


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


def read_rows(study: Study, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the finished rows of this study. Raises UserError for those of another."""
    ours = study_of(study, args)
    rows = []
    for path in sorted(args.rows.glob("row_*.json")):
        row = json.loads(path.read_text())
        theirs = row.get("study", {})
        others = [
            f"{name} {theirs.get(name)}" for name in study.flags if theirs.get(name) != ours[name]
        ]
        if others or not row["recalls"].keys() >= {*study.measures}:
            raise UserError(
                f"{path} is of another study ({', '.join(others)}), or of an earlier version of"
                " this one. Give its flags or another --rows; a row can be deleted, and is made"
                " anew."
            )
        rows.append(row)
    return rows


def add_flags(parser: argparse.ArgumentParser, output: str, arms: str) -> None:
    """Add the flags that studies have in common."""
    parser.add_argument("--output", type=Path, default=Path(output), help="runs")
    parser.add_argument("--rows", type=Path, help="results, one file each; by default in --output")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first_seed", type=int, default=1)
    parser.add_argument("--arms", default=arms)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1, help="arms that run at once")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of an arm")
    parser.add_argument("--report_only", action="store_true")
    parser.add_argument("--baselines", default="control", help="arms that gains are over")
    parser.add_argument("--figure", type=Path, help="draw the recalls of --arms to this file")


def read_flags(parser: argparse.ArgumentParser, study: Study) -> argparse.Namespace:
    """Parse the command line, and make the directories. Raises UserError for arms that `study` has
    not."""
    args = parser.parse_args(sys.argv[1:])
    for flag, names in (("--arms", args.arms), ("--baselines", args.baselines)):
        unknown = [arm for arm in names.split(",") if arm not in study.arms]
        if unknown:
            arms = ", ".join(study.arms)
            raise UserError(f"{flag}: no {', '.join(unknown)} in this study. There are: {arms}.")
    args.output = args.output.absolute()
    args.rows = (args.rows or args.output).absolute()
    args.output.mkdir(parents=True, exist_ok=True)
    args.rows.mkdir(parents=True, exist_ok=True)
    return args


def conclude(study: Study, args: argparse.Namespace, title: str) -> None:
    """Print the tables of all rows, and draw the figure."""
    rows = read_rows(study, args)
    report(study, rows, args.rounds, args.baselines.split(","))
    if args.figure:
        draw(study, rows, args, title)
