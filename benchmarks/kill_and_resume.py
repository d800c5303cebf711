"""`kill -9` runs at random moments, resume each, and compare every file with the unbroken run's.

The runs are those of tests/faults: the real command on a very small configuration, in children
forked from a process that has imported everything. Each is killed at a moment drawn over the time
of the unbroken run and resumed, as often as `--each` says, with moments drawn over a part of that
time. In a share of them, `--full_disk`, a write that is drawn by chance meets a full disk (ENOSPC)
where the run comes to it before the kill, which must end the command with one error, or only be
told where no result depends on the file. Resumed at last to its end, a run must
end with exit code 0, and every file of the run directory and of the feature cache must have the
unbroken run's bytes (not config.json and costs.json, which hold times and paths). Prints by stage
how many kills and full disks it was resumed from to that, and the files of each run that was not.

With `--processes 2` one process of a training stage is killed instead, under `accelerate launch`
with `--strategy` ddp, fsdp, zero2 or zero3 (benchmarks/_killed_processes.py says how). Prints how
many resumed to a loss curve equal within 1e-5, the largest difference, and how long the launcher
took to end the others.

    python benchmarks/kill_and_resume.py
    python benchmarks/kill_and_resume.py --kills 20 --workers 1
    python benchmarks/kill_and_resume.py --kills 10000 --each 10 --full_disk 0.1
    python benchmarks/kill_and_resume.py --processes 2 --strategy zero3 --kills 100
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import _killed_processes

from cirloop.monitoring.console import table
from tests.faults.fault_case import REFUSED, refused_clearly
from tests.faults.harness import OPEN, Ended, Harness, age, tree
from tests.faults.write_points import refusals

Outcome = tuple[str, str]
"""The stage that was interrupted, and what is wrong ("" = nothing)."""
LONGEST = 3.0
"""Of several kills of a run the moments are drawn over so many times their even share of its
time, as a resumed run does its openings and checks again."""
FULL_DISK = [case for case in refusals() if case.kind == "ENOSPC" and case.point.scene == "run"]


def stage_of(said: str) -> str:
    """The last stage that a log says has begun."""
    begun = re.findall(r": start \((\w+(?:\.json)?)\)$", said, re.M)
    return begun[-1] if begun else "before the first stage"


def interruption(chance: random.Random, longest: float, full_disk: float) -> dict[str, Any]:
    """A kill within `longest` seconds, or before that a full disk at one of the run's writes."""
    told: dict[str, Any] = {"kill_after": chance.uniform(0, longest)}
    if chance.random() < full_disk:
        told["fault"] = chance.choice(FULL_DISK).fault | {"nth": chance.randint(1, 2)}
    return told


def wrong_end(ended: Ended, case: Path, met_full_disk: bool) -> str:
    """What is wrong with the end of an interrupted run."""
    if ended.code == -signal.SIGKILL or (met_full_disk and ended.code == 0):
        return ""
    if met_full_disk and ended.code == REFUSED:
        with suppress(AssertionError):
            refused_clearly(ended.said, case)
            return ""
    return f"exit code {ended.code}: {ended.said[-2000:]}"


def one(
    harness: Harness, chance: random.Random, seconds: float, kills: int, full_disk: float
) -> list[Outcome]:
    """Interrupt a run up to `kills` times, then let it end: the interruptions, and whether all is
    well."""
    case, stages, wrong = harness.case(OPEN), list[str](), ""
    # a resumed run begins where it was: several moments over the whole time would end it early
    longest = seconds if kills == 1 else LONGEST * seconds / kills
    try:
        while len(stages) < kills and not wrong:
            told = interruption(chance, longest, full_disk)
            ended = harness.child(case, "run", **told)
            met_full_disk = "fault" in told and ended.fired and ended.code != -signal.SIGKILL
            if ended.code == 0 and not met_full_disk:
                break
            stages.append("full disk: " * met_full_disk + stage_of(ended.said))
            wrong = wrong_end(ended, case, met_full_disk)
        age(case)
        ended = harness.child(case, "run")
        if ended.code:
            wrong = wrong or f"exit code {ended.code}: {ended.said[-2000:]}"
        there, expected = tree(case), harness.expected("run", None)
        names = sorted({*there, *expected})
        wrong = wrong or ", ".join(name for name in names if there.get(name) != expected.get(name))
        if wrong and not stages:
            stages = ["no stage"]
        return [(stage, wrong) for stage in stages]
    finally:
        shutil.rmtree(case)


def many(seed: int, kills: int, each: int, full_disk: float) -> list[Outcome]:
    """Interrupt runs until there are `kills` interruptions."""
    with tempfile.TemporaryDirectory(prefix="cirloop_kill_") as name:
        harness = Harness(Path(name))
        try:
            harness.expected("run", None)
            began = time.monotonic()
            assert harness.child(harness.case(OPEN), "run").code == 0
            seconds, chance = time.monotonic() - began, random.Random(seed)
            outcomes, told = list[Outcome](), 0
            while len(outcomes) < kills:
                left = kills - len(outcomes)
                outcomes += one(harness, chance, seconds, min(each, left), full_disk)
                wrong = [said for _, said in outcomes if said]
                if len(outcomes) >= told + 25 or (outcomes and outcomes[-1][1]):
                    told = len(outcomes)
                    last = outcomes[-1][1]
                    print(f"seed {seed}: {told} of {kills}, {len(wrong)} wrong {last}", flush=True)
            return outcomes
        finally:
            harness.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=1000, help="kills and full disks")
    parser.add_argument("--each", type=int, default=1, help="of a run, before it is let end")
    parser.add_argument(
        "--full_disk",
        type=float,
        default=0.0,
        help="share of kills with a full disk planned before them, 0 to 1",
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
    if min(args.kills, args.each, args.workers) < 1 or not 0 <= args.full_disk <= 1:
        parser.error("--kills, --each and --workers are at least 1, --full_disk from 0 to 1")
    if args.processes > 1:
        right = _killed_processes.many(args.strategy, args.processes, args.kills, args.seed)
        sys.exit(not right)
    shares = [len(range(worker, args.kills, args.workers)) for worker in range(args.workers)]
    began = time.monotonic()
    with ProcessPoolExecutor(args.workers) as pool:
        seeds = range(args.seed, args.seed + args.workers)
        made = pool.map(partial(many, each=args.each, full_disk=args.full_disk), seeds, shares)
        outcomes = [outcome for each in made for outcome in each]
    where, right = (
        Counter(stage for stage, _ in outcomes),
        Counter(stage for stage, wrong in outcomes if not wrong),
    )
    rows = [(stage, f"{right[stage]} of {num}") for stage, num in where.most_common()]
    table(
        f"{args.kills} times, in {time.monotonic() - began:.0f} s",
        ("interrupted in", "resumed to equal bytes"),
        rows,
    )
    for wrong in dict.fromkeys(wrong for _, wrong in outcomes if wrong):
        print(wrong)
    print(f"{sum(right.values())} of {len(outcomes)}")
    sys.exit(sum(right.values()) != len(outcomes))


if __name__ == "__main__":
    main()
