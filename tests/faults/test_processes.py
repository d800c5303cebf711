"""A stage's processes under `accelerate launch`: one dies, one stands still. tests/distributed
kills a share's."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cirloop.artifacts.store import file_digests
from tests.commands import environment
from tests.distributed.test_many import are_gone, processes
from tests.faults.fault_case import REFUSED, refused_clearly
from tests.faults.harness import ROOT, Harness

STAGE = "checkpoint_iter_1"
LONG = 240.0
"""Seconds that nothing here takes."""


def start(harness: Harness, directory: Path, minutes: float = 30) -> subprocess.Popen[str]:
    """The training stage in two processes."""
    flags = ["--config", str(harness.home / "run.yaml"), "--experiment_dir", str(directory / "run")]
    flags += ["--num_processes", "2", "--runtime.hang_timeout_minutes", str(minutes)]
    words = [sys.executable, str(ROOT / "train_iterative.py"), *flags, "--auto_resume"]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen(words, env=environment(), text=True, **pipes)  # type: ignore[call-overload]


def trained(harness: Harness, directory: Path) -> dict[str, str]:
    """Digests of the checkpoint; what follows is not waited for."""
    until = time.monotonic() + LONG
    with start(harness, directory) as driver:
        while (
            STAGE
            not in json.loads((directory / "run/manifest.json").read_text("utf-8"))["artifacts"]
        ):
            assert driver.poll() is None and time.monotonic() < until, driver.communicate()[1]
            time.sleep(0.05)
        driver.kill()
    return file_digests(directory / "run" / STAGE)


@pytest.fixture(scope="module")
def unbroken(harness: Harness) -> dict[str, str]:
    return trained(harness, harness.case(STAGE))


@pytest.mark.full
@pytest.mark.parametrize(
    ("sent", "minutes", "says"),
    [(signal.SIGKILL, 30.0, "ended with"), (signal.SIGSTOP, 0.4, "ended with exit code 1")],
    ids=["dies", "stands still"],
)
def test_a_process_that(
    sent: signal.Signals, minutes: float, says: str, unbroken: dict[str, str], harness: Harness
) -> None:
    directory = harness.case(STAGE)
    with start(harness, directory, minutes) as driver:
        until = time.monotonic() + LONG
        while not [*(directory / "run/.work" / STAGE).glob("step_*")]:
            assert driver.poll() is None and time.monotonic() < until, driver.communicate()[1]
            time.sleep(0.01)
        children = dict(processes(driver.pid))
        workers = [
            pid
            for pid, line in children.items()
            if "cirloop.distributed.worker" in line and "launch" not in line
        ]
        os.kill(workers[-1], sent)
        _, said = driver.communicate(timeout=LONG)
    assert driver.returncode == REFUSED, said
    assert says in said and said.count("error: the training stage's processes") == 1
    assert "--auto_resume" in said
    are_gone(children)
    if sent is signal.SIGKILL:  # what is resumed is the same after either
        assert trained(harness, directory) == unbroken


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
