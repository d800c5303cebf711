"""SIGTERM at any time: the run ends at a safe moment with code 75, and goes on to the bytes of an
unbroken one."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from cirloop.artifacts import run_lock
from cirloop.artifacts.store import file_digests
from cirloop.monitoring import preemption
from cirloop.monitoring.console import progress
from tests.commands import command, environment
from tests.distributed.test_many import are_gone, processes
from tests.test_end_to_end import ARTIFACTS

ROOT = Path(__file__).resolve().parents[2]
LONG = 600
LAUNCHER = "cirloop.distributed.accelerate_launch"


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def terminated_at(line: str) -> Iterator[None]:
    """This process gets SIGTERM when the program logs a line that holds `line`."""

    class Watch(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if line in record.getMessage():
                terminate()

    handler, logger = Watch(), logging.getLogger("cirloop")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


@contextmanager
def terminated_when(there: Callable[[], bool]) -> Iterator[None]:
    """This process gets SIGTERM as soon as `there`."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.001):
            if there():
                return terminate()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def settings(tmp_path: Path, config: Any) -> list[str]:
    path = tmp_path / f"{config.directory.name}.yaml"
    path.write_text(yaml.safe_dump(config.to_json()))
    return ["--config", str(path), "--experiment_dir", str(config.directory)]


def test_the_signal_is_noted_and_takes_effect_at_safe_moments(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with preemption.handle_sigterm():
        preemption.raise_if_requested()
        assert not preemption.stop_requested()
        terminate()
        assert preemption.stop_requested()
        with preemption.defer_to_step():
            preemption.raise_if_requested()
        with pytest.raises(preemption.GracefulStop):
            preemption.raise_if_requested()
    assert signal.getsignal(signal.SIGTERM) is before and not preemption.stop_requested()
    order = tmp_path / "stop"
    with preemption.handle_sigterm(order):
        preemption.raise_if_requested()
        order.touch()
        with pytest.raises(preemption.GracefulStop):
            preemption.raise_if_requested()


def test_a_bar_is_left_between_two_items() -> None:
    seen = []
    with preemption.handle_sigterm(), pytest.raises(preemption.GracefulStop):
        for number in progress(range(5), "test"):
            seen.append(number)
            if number == 2:
                terminate()
    assert seen == [0, 1, 2]


def test_a_thread_that_can_handle_no_signal_leaves_its_meaning() -> None:
    before, found = signal.getsignal(signal.SIGTERM), list[bool]()

    def run() -> None:
        with preemption.handle_sigterm():
            found.append(signal.getsignal(signal.SIGTERM) is before)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [True]


@pytest.mark.full
def test_stopped_in_every_stage_it_goes_on_to_the_same_bytes(
    finished: Path, small: Any, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    steps = directory / ".work" / "checkpoint_iter_0"
    flags = [*settings(tmp_path, small(directory)), "--auto_resume"]
    for stage in (
        "evaluation_base.json",
        "checkpoint_iter_0",
        "",
        "hard_negatives_iter_0.json",
        "augmented_samples_iter_1.json",
        "checkpoint_iter_1",
        "evaluation_iter_1.json",
    ):
        with (
            terminated_at(f"start ({stage})")
            if stage
            else terminated_when(lambda: any(steps.glob("step_*")))
        ):
            done = command("train_iterative.py", *flags)
        assert done.returncode == preemption.EXIT_PREEMPTED == 75, (stage, done.stderr)
        assert done.stderr.splitlines()[-1] == "stopped by SIGTERM; go on with --auto_resume"
        assert not (directory / stage).is_file() and not (directory / run_lock.FILE).exists()
        assert len([*steps.glob("step_*")]) == (not stage)
    done = command("train_iterative.py", *flags)
    assert done.returncode == 0, done.stderr
    for name in ARTIFACTS:
        assert file_digests(directory / name) == file_digests(finished / name), name
    left = {path.name for path in directory.iterdir()}
    assert left == {*ARTIFACTS, "config.json", "costs.json", "report.html", "figures", "logs"}


def started(words: list[str], line: str, log: Path, **more: Any) -> subprocess.Popen[bytes]:
    """A command as a process of its own session, once it has logged `line`."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            words, stdout=subprocess.DEVNULL, stderr=file, start_new_session=True, **more
        )
    deadline = time.monotonic() + LONG
    while line not in log.read_text(errors="replace"):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text(
            errors="replace"
        )[-3000:]
        time.sleep(0.02)
    return process


WARM_UP = {
    "num_iterations": 0,
    "evaluation": {"evaluate_base": False},
    "training": {"iteration_0_steps": 2000},
}
"""A run of one long stage."""


def training(tmp_path: Path, config: Any, line: str) -> subprocess.Popen[bytes]:
    words = [sys.executable, str(ROOT / "train_iterative.py"), *settings(tmp_path, config)]
    return started(words, line, tmp_path / "log", env=environment())


def kept_steps(tmp_path: Path) -> list[Path]:
    return [*(tmp_path / "run").glob(".work/checkpoint_iter_0/step_*")]


@pytest.mark.full
def test_the_shell_script_passes_the_signal_and_the_code_on(small: Any, tmp_path: Path) -> None:
    config = small(tmp_path / "run", **WARM_UP)
    words = [str(ROOT / "run_iterative_training.sh"), *settings(tmp_path, config)]
    ours = environment(PYTHON=sys.executable)
    process = started(words, "start (checkpoint_iter_0)", tmp_path / "log", env=ours)
    process.terminate()
    assert process.wait(LONG) == 75
    assert "of 2000 steps are done and kept" in (tmp_path / "log").read_text()
    assert len(kept_steps(tmp_path)) == 1


@pytest.mark.full
@pytest.mark.parametrize(
    ("whom", "zero"),
    [("driver", ""), ("group", ""), ("launcher", ""), ("driver", "zero2"), ("launcher", "zero3")],
)
def test_two_training_processes_stop_after_the_same_step(
    whom: str, zero: str, small: Any, tmp_path: Path
) -> None:
    runtime: dict[str, Any] = {"num_processes": 2, "checkpoint_every_steps": 0}
    if zero:
        runtime["deepspeed"] = ROOT / "configs" / "deepspeed" / f"{zero}.json"
    config = small(tmp_path / "run", **WARM_UP, runtime=runtime)
    process = training(tmp_path, config, "training in 2 processes")
    there = dict(processes(process.pid))
    [launcher, *_] = [pid for pid, line in there.items() if LAUNCHER in line]
    match whom:
        case "driver":
            process.terminate()
        case "group":
            os.killpg(process.pid, signal.SIGTERM)
        case _:
            os.kill(launcher, signal.SIGTERM)
    log = tmp_path / "log"
    assert process.wait(LONG) == 75, log.read_text()[-3000:]
    are_gone(there)
    (kept,) = kept_steps(tmp_path)
    record = json.loads((kept / "state.json").read_text())
    assert len(record["log"]) == record["step"] < 2000
    said = f"asked to stop: {record['step']} of 2000 steps are done and kept"
    assert log.read_text().count(said) == 1


@pytest.mark.full
def test_two_processes_that_embed_end_at_once(small: Any, tmp_path: Path) -> None:
    data = {"type": "shapes", "train_families": 6, "train_triplets": 48, "eval_families": 60}
    runtime = {"num_processes": 2, "embed_batch_size": 4}
    config = small(tmp_path / "run", num_iterations=0, data=data, runtime=runtime)
    process = training(tmp_path, config, "start (evaluation_base.json)")
    there: list[int] = []
    while not there:
        children = processes(process.pid)
        there = [pid for pid, line in children if "cirloop.distributed.worker" in line]
        time.sleep(0.02)
    process.terminate()
    assert process.wait(60) == 75
    are_gone(there)
    assert not [*(tmp_path / "run" / ".work").glob("shares*")]


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize(("code", "says"), [(75, "requeue 7"), (0, ""), (2, "")])
def test_the_slurm_script_asks_for_another_turn_where_a_run_stopped(
    code: int, says: str, tmp_path: Path
) -> None:
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        f"#!/bin/bash\ntrap 'exit {code}' TERM\ntouch ready\nwhile :; do sleep 0.05; done\n"
    )
    (tmp_path / "scontrol").write_text('#!/bin/bash\necho "$@"\n')
    for file in (python, tmp_path / "scontrol"):
        file.chmod(0o755)
    slurm = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7"}
    batch = subprocess.Popen(
        ["bash", str(ROOT / "scripts" / "slurm.sbatch")],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", **slurm},
        stdout=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "ready").exists():
        assert batch.poll() is None
        time.sleep(0.02)
    batch.terminate()
    said, _ = batch.communicate(timeout=30)
    assert said.strip() == says and batch.returncode == (0 if code == 75 else code)
