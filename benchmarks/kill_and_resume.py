"""`kill -9` runs at random moments, resume each, and compare every file with the unbroken run's.

The runs are those of tests/faults: the real command on a very small configuration, in children
forked from a process that has imported everything. Each is killed at a moment drawn over the time
of the unbroken run, then, as often as `--again` says, the resumed one too, and then it is resumed
to the end. It must end with exit code 0, and every file of the run directory and of the feature
cache must have the unbroken run's bytes (not config.json and costs.json, which hold times and
paths). Prints how many did by the stage that was killed, and the files of each that did not.

With `--processes 2` one process of a training stage is killed instead, under `accelerate launch`
with `--strategy` ddp, fsdp, zero2 or zero3 (benchmarks/_killed_processes.py says how). Prints how
many resumed to a loss curve equal within 1e-5, the largest difference, and how long the launcher
took to end the others.

    python benchmarks/kill_and_resume.py
    python benchmarks/kill_and_resume.py --kills 20 --workers 1
    python benchmarks/kill_and_resume.py --processes 2 --strategy zero3 --kills 100
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import _killed_processes

from cirloop.monitoring.console import table
from tests.faults.harness import OPEN, Harness, age, tree

Outcome = tuple[str, str]
"""The stage that was killed, and what is wrong ("" = nothing)."""
UNHARMED = "no stage"
"""A run that ended before its moment; another is drawn in its place."""


def stage_of(said: str) -> str:
    """The last stage that a log says has begun."""
    begun = re.findall(r"([a-z]\w*(?:\.json)?): start$", said, re.M)
    return begun[-1] if begun else "before the first stage"


def one(harness: Harness, moments: random.Random, seconds: float, again: int) -> Outcome:
    case, where = harness.case(OPEN), UNHARMED
    try:
        for number in range(1 + again):
            killed = harness.child(case, "run", kill_after=moments.uniform(0, seconds))
            if killed.code == 0:
                break
            if killed.code != -9:
                return where, f"exit code {killed.code}: {killed.said[-2000:]}"
            where = stage_of(killed.said) if number == 0 else where
        age(case)
        ended = harness.child(case, "run")
        if ended.code:
            return where, f"exit code {ended.code}: {ended.said[-2000:]}"
        there, expected = tree(case), harness.expected("run", None)
        differ = sorted(
            name for name in {*there, *expected} if there.get(name) != expected.get(name)
        )
        return where, ", ".join(differ)
    finally:
        shutil.rmtree(case)


def many(seed: int, kills: int, again: int) -> list[Outcome]:
    with tempfile.TemporaryDirectory(prefix="cirloop_kill_") as name:
        harness = Harness(Path(name))
        try:
            harness.expected("run", None)
            began = time.monotonic()
            assert harness.child(harness.case(OPEN), "run").code == 0
            seconds, moments = time.monotonic() - began, random.Random(seed)
            outcomes: list[Outcome] = []
            while len(outcomes) < kills:
                outcome = one(harness, moments, seconds, again)
                if outcome == (UNHARMED, ""):
                    continue
                outcomes.append(outcome)
                if outcome[1] or len(outcomes) % 25 == 0:
                    wrong = sum(bool(each[1]) for each in outcomes)
                    print(
                        f"seed {seed}: {len(outcomes)} of {kills}, {wrong} wrong {outcome[1]}",
                        flush=True,
                    )
            return outcomes
        finally:
            harness.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=1000, help="runs that are killed")
    parser.add_argument(
        "--again", type=int, default=0, help="further kills of each, of the resumed run"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--processes", type=int, default=1, help="of a training stage, of which one is killed"
    )
    parser.add_argument(
        "--strategy", choices=_killed_processes.STRATEGIES, default="ddp", help="of --processes"
    )
    args = parser.parse_args()
    if args.processes > 1:
        right = _killed_processes.many(args.strategy, args.processes, args.kills, args.seed)
        sys.exit(not right)
    shares = [len(range(worker, args.kills, args.workers)) for worker in range(args.workers)]
    began = time.monotonic()
    with ProcessPoolExecutor(args.workers) as pool:
        made = pool.map(
            many, range(args.seed, args.seed + args.workers), shares, [args.again] * args.workers
        )
        outcomes = [outcome for each in made for outcome in each]
    where, right = (
        Counter(stage for stage, _ in outcomes),
        Counter(stage for stage, wrong in outcomes if not wrong),
    )
    rows = [(stage, f"{right[stage]} of {num}") for stage, num in where.most_common()]
    table(
        f"{args.kills} runs killed, in {time.monotonic() - began:.0f} s",
        ("killed in", "resumed to equal bytes"),
        rows,
    )
    for stage, wrong in outcomes:
        if wrong:
            print(f"{stage}: {wrong}")
    print(f"{sum(right.values())} of {len(outcomes)}")
    sys.exit(sum(right.values()) != len(outcomes))


if __name__ == "__main__":
    main()
