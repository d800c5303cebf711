"""`kill_and_resume.py --processes N`: one of the processes of a training stage is killed.

A stage of `STEPS` steps of the `tiny` model, with a step checkpoint every `EVERY` of them, is
trained unbroken under `accelerate launch`. Then it is trained again: one process, drawn by chance,
gets SIGKILL at a step and moment drawn by chance, the launcher ends the others, and the next launch
resumes at the newest step checkpoint, to be killed too, until a stage ends and another begins. So a
kill costs one launch. It is judged by the steps that the next launch takes.
"""

from __future__ import annotations

import json
import os
import random
import signal
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cirloop.artifacts.store import file_digests
from cirloop.config.run import RunConfig, save
from cirloop.config.runtime import Runtime
from cirloop.distributed import launcher
from cirloop.distributed.jobs import TrainJob
from cirloop.types import UserError
from tests.distributed.test_many import processes

ROOT = Path(__file__).resolve().parent.parent
STRATEGIES = ("ddp", "fsdp", "zero2", "zero3")
STEPS, EVERY, MOST_AHEAD = 30, 3, 8
"""A process is killed 1 to `MOST_AHEAD` steps after the one its launch resumed at."""
MOMENT_S = 0.5
"""A process is killed up to so many seconds after a step's end: in the next one, or as a step
checkpoint is written."""
LIMIT = 180.0
"""Seconds in which all processes must have ended after one was killed."""
CURVE = 1e-5
"""Largest difference of two losses that count as equal."""


@dataclass(frozen=True, slots=True)
class Kill:
    """A kill: after so many steps, of the process of this rank; then what the resumed stage did."""

    step: int
    rank: int
    seconds: float
    """Until the launcher had ended."""
    difference: float
    """Largest difference of a loss from the unbroken stage's."""
    equal: bool
    """The resumed steps' rows are the unbroken stage's, to the last digit that is kept."""
    wrong: str = ""


def runtime(strategy: str, num: int, cache: Path) -> Runtime:
    configs = ROOT / "configs"
    more = {"num_processes": num, "cache_dir": cache, "checkpoint_every_steps": EVERY}
    if strategy == "fsdp":
        return Runtime(accelerate_config=configs / "accelerate" / "cpu_2_fsdp2.yaml", **more)
    if strategy.startswith("zero"):
        return Runtime(deepspeed=configs / "deepspeed" / f"{strategy}.json", **more)
    return Runtime(**more)


class Stage:
    """A training stage in `directory`, which several launches may train."""

    def __init__(self, directory: Path, used: Runtime) -> None:
        run = directory / "run"
        run.mkdir(parents=True)
        config = RunConfig(
            experiment_dir=run,
            model={"type": "qwen2_vl", "path": "tiny", "dtype": "float32"},
            data={"type": "shapes", "train_families": 3, "train_triplets": 24, "eval_families": 2},
            training={"iteration_0_steps": STEPS, "batch_size": 4},
            runtime=used,
        )
        save(config, run / "config.json")
        self.runtime = used
        self.job = TrainJob(
            directory=directory / "work", log=directory / "attempt.log", run=run,
            cache=config.cache, iteration=0, steps=STEPS, parent=None, augmented=(),
            negatives=None, schedule=(0, STEPS), key="killed", workspace=directory / "work/steps",
            output=directory / "checkpoint",
        )  # fmt: skip

    def train(self) -> str:
        """Launch the stage once; the error's message, "" where it ended well."""
        try:
            launcher.run_training(self.job, self.runtime)
        except UserError as error:
            return str(error)
        return ""

    def kept(self) -> int:
        """The step that the next launch resumes at."""
        found = [*self.job.workspace.glob("step_*/state.json")]
        return max((json.loads(path.read_text())["step"] for path in found), default=0)

    def rows(self) -> list[dict[str, float]]:
        """The rows of all steps, those before this launch too."""
        said = ""
        with suppress(FileNotFoundError):  # a launch begins with none
            said = self.job.rows.read_text()
        return [json.loads(line) for line in said.splitlines(keepends=True) if line[-1] == "\n"]

    def result(self) -> dict[str, str]:
        return file_digests(self.job.output)


def workers() -> dict[int, int]:
    """The training processes' numbers by rank."""
    found = {}
    for pid, line in processes(os.getpid()):
        if " cirloop.distributed.worker " in line and "accelerate_launch" not in line:
            with suppress(OSError):
                variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
                ranks = [v for v in variables if v.startswith("RANK=")]
                found.update({int(rank.removeprefix("RANK=")): pid for rank in ranks})
    return found


class Killer(threading.Thread):
    """Kills one process of a launch, `after` so many steps and `delay` seconds, and all of them
    where they do not end then."""

    def __init__(self, stage: Stage, rank: int, after: int, delay: float) -> None:
        super().__init__(daemon=True)
        self.stage, self.rank, self.after, self.delay = stage, rank, after, delay
        self.over = threading.Event()
        self.at: float | None = None
        self.stood_still = False

    def run(self) -> None:
        while len(self.stage.rows()) < self.after:
            if self.over.wait(0.005):
                return
        time.sleep(self.delay)
        with suppress(ProcessLookupError, KeyError):
            os.kill(workers()[self.rank], signal.SIGKILL)
            self.at = time.monotonic()
        if not self.over.wait(LIMIT):
            self.stood_still = True
            for pid, _ in [*processes(os.getpid())]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def compared(
    rows: list[dict[str, float]], expected: list[dict[str, float]], start: int
) -> tuple[float, bool]:
    """The largest difference of a loss from `start` on, and whether the rows are equal."""
    pairs = [*zip(rows[start:], expected[start:], strict=False)]
    differences = [abs(row["loss"] - other["loss"]) for row, other in pairs]
    return max(differences, default=0.0), all(row == other for row, other in pairs)


def one_stage(
    stage: Stage, expected: Stage, num: int, chance: random.Random, most: int
) -> list[Kill]:
    """Train the stage, killed at most `most` times, to its end."""
    kills: list[Kill] = []
    before: tuple[int, int, float, str] | None = None
    while True:
        start = stage.kept()
        rank, after = chance.randrange(num), start + chance.randint(1, MOST_AHEAD)
        stage.job.rows.unlink(missing_ok=True)  # the launch before said them
        killer = Killer(stage, rank, after, chance.uniform(0, MOMENT_S))
        if len(kills) + (before is not None) < most and after < STEPS:
            killer.start()
        said = stage.train()
        killer.over.set()
        ended = time.monotonic()
        rows = stage.rows()
        difference, equal = compared(rows, expected.rows(), start)
        if before is not None:
            wrong = before[3] or ("" if len(rows) > start else "no step after it")
            if not said and stage.result() != expected.result():
                wrong = wrong or "the checkpoint differs"
            kills.append(Kill(*before[:3], difference, equal, wrong))
            report(kills[-1])
        if not said:
            return kills
        if killer.at is None:
            raise SystemExit(f"a launch ended by itself: {said}")
        wrong = "the others stood still" if killer.stood_still else ""
        wrong = wrong or ("" if "--auto_resume" in said else f"unclear: {said}")
        before = (len(rows), rank, ended - killer.at, wrong)


def report(kill: Kill) -> None:
    print(
        f"after step {kill.step:2} rank {kill.rank}: the launch ended in {kill.seconds:.1f} s,"
        f" difference {kill.difference:.1e} {kill.wrong}",
        flush=True,
    )


def many(strategy: str, num: int, kills: int, seed: int) -> bool:
    """Kill, print what came of it, and return whether all was well."""
    chance, found = random.Random(seed), list[Kill]()
    with tempfile.TemporaryDirectory(prefix="cirloop_kill_") as name:
        home = Path(name)
        used = runtime(strategy, num, home / "cache")
        expected = Stage(home / "unbroken", used)
        began = time.monotonic()
        if said := expected.train():
            raise SystemExit(said)
        while len(found) < kills:
            stage = Stage(home / f"stage_{len(found)}", used)
            found += one_stage(stage, expected, num, chance, kills - len(found))
        spent = time.monotonic() - began
    right = sum(not kill.wrong and kill.difference <= CURVE for kill in found)
    equal = sum(not kill.wrong and kill.equal for kill in found)
    print(
        f"{strategy}, {num} processes, {spent:.0f} s: largest difference of a loss"
        f" {max(kill.difference for kill in found):.1e}, equal to the last digit {equal}, longest"
        f" until the others had ended {max(kill.seconds for kill in found):.1f} s"
    )
    print(f"{right} of {len(found)} resumed to an equal loss curve")
    return right == len(found)
