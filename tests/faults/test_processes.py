"""A stage's processes under `accelerate launch`: one dies, one stands still. tests/distributed
kills a share's."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cirloop.artifacts.store import file_digests
from tests.commands import environment
from tests.distributed.test_many import are_gone, processes
from tests.faults.fault_case import REFUSED, refused_clearly
from tests.faults.harness import ROOT, Harness

STAGE = "checkpoint_iter_1"
LONG = 600.0
"""Seconds that nothing here takes."""


ZERO = {
    name: ["--deepspeed", str(ROOT / "configs" / "deepspeed" / f"{name}.json")]
    for name in ("zero2", "zero3")
}
"""Flags of what holds the weights; DDP needs none."""


def start(
    harness: Harness, directory: Path, minutes: float = 30, strategy: str = "ddp"
) -> subprocess.Popen[str]:
    """The training stage in two processes."""
    flags = ["--config", str(harness.home / "run.yaml"), "--experiment_dir", str(directory / "run")]
    flags += ["--num_processes", "2", "--runtime.hang_timeout_minutes", str(minutes)]
    flags += ZERO.get(strategy, [])
    words = [sys.executable, str(ROOT / "train_iterative.py"), *flags, "--auto_resume"]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen(words, env=environment(), text=True, **pipes)  # type: ignore[call-overload]


def trained(harness: Harness, directory: Path, strategy: str = "ddp") -> dict[str, str]:
    """Digests of the checkpoint; what follows is not waited for."""
    until = time.monotonic() + LONG
    with start(harness, directory, strategy=strategy) as driver:
        while (
            STAGE
            not in json.loads((directory / "run/manifest.json").read_text("utf-8"))["artifacts"]
        ):
            assert driver.poll() is None and time.monotonic() < until, driver.communicate()[1]
            time.sleep(0.05)
        driver.kill()
    return file_digests(directory / "run" / STAGE)


def kill_a_worker(
    driver: subprocess.Popen[str], sent: signal.Signals, begun: Callable[[], bool]
) -> str:
    """Send a signal to one of the training processes once they have `begun`; return what the driver
    said when all had ended."""
    until = time.monotonic() + LONG
    while not begun():
        assert driver.poll() is None and time.monotonic() < until, driver.communicate()[1]
        time.sleep(0.01)
    children = dict(processes(driver.pid))
    workers = [
        pid
        for pid, line in children.items()
        if "cirloop.distributed.worker" in line and "launch" not in line
    ]
    os.kill(random.choice(workers), sent)
    _, said = driver.communicate(timeout=LONG)
    assert driver.returncode == REFUSED, said
    assert said.count("error: the training stage's processes") == 1
    assert "--auto_resume" in said
    are_gone(children)
    return said


@pytest.mark.full
@pytest.mark.parametrize("strategy", ["ddp", *ZERO])
def test_a_process_that_dies_at_a_step_ends_the_others_and_what_is_resumed_is_the_same(
    strategy: str, harness: Harness
) -> None:
    unbroken = trained(harness, harness.case(STAGE), strategy)
    directory = harness.case(STAGE)
    rows, step = directory / "run/.work/steps.jsonl", random.randint(1, 3)
    with start(harness, directory, strategy=strategy) as driver:
        kill_a_worker(
            driver,
            signal.SIGKILL,
            lambda: rows.exists() and rows.read_text().count("\n") >= step,
        )
    assert trained(harness, directory, strategy) == unbroken, f"killed after step {step}"


@pytest.mark.full
def test_a_process_that_stands_still_ends_the_others_after_a_while(harness: Harness) -> None:
    directory = harness.case(STAGE)
    with start(harness, directory, minutes=0.4) as driver:
        steps = directory / "run/.work" / STAGE
        said = kill_a_worker(driver, signal.SIGSTOP, lambda: any(steps.glob("step_*")))
    assert "ended with exit code 1" in said


@pytest.mark.full
def test_a_file_that_a_process_may_not_write(harness: Harness) -> None:
    """The size of files is limited for the processes, as a full disk would: the file is named, in
    one message at the end. (The other process and torchrun show tracebacks of their own, where they
    noticed that it had ended.)"""
    directory = harness.case(STAGE)
    with start(harness, directory) as driver:
        resource.prlimit(
            driver.pid, resource.RLIMIT_FSIZE, (200_000, 200_000)
        )  # less than a step checkpoint
        _, said = driver.communicate(timeout=LONG)
    assert driver.returncode == REFUSED, said
    assert "OSError" not in said, said
    refused_clearly(said[said.rindex("error: ") :], directory)
    assert "state.safetensors" in said and "ulimit -f" in said
