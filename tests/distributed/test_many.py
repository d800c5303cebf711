"""Stages in several real processes: the same bytes as one, and a killed share ends the stage, to be
resumed.

tests/faults/test_processes.py kills one that trains.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from cirloop.artifacts.store import Store, file_digests
from cirloop.cli import runner
from cirloop.cli.evaluate import EvalConfig, evaluate
from cirloop.config.runtime import Runtime
from cirloop.distributed import launcher
from cirloop.distributed.sharded_executor import DistributedCaptioner
from cirloop.monitoring.costs import Costs
from cirloop.stages.caption import caption
from cirloop.stages.context import RunContext
from cirloop.stages.evaluate import evaluate as evaluate_stage
from cirloop.stages.mine import mine
from cirloop.stages.train import train
from cirloop.types import UserError
from tests.census import Census, counted
from tests.commands import python
from tests.stages.copies import CHECKPOINT, copied

ROOT = Path(__file__).resolve().parents[2]
SOON = 60
"""Seconds in which a stage must have ended after one of its processes was killed."""
A_MOMENT = 10
"""Seconds in which what a command started must be gone after it."""
LONG = 900
NAMES = ("hard_negatives_iter_0.json", "augmented_samples_iter_1.json", "evaluation_iter_0.json")
COUNTERS = ("images_encoded", "items", "tokens", "padding", "texts", "tokens_written")


def artifacts(small: Any, finished: Path, directory: Path, num_processes: int) -> dict[str, Any]:
    """The artifacts of mining, captioning and evaluation in a directory and vision cache of their
    own; then a step of training, whose bits depend on the number of processes."""
    runtime = {
        "num_processes": num_processes,
        "embed_batch_size": 8,
        "cache_dir": directory / "cache",
    }
    config = small(
        directory / "run",
        runtime=runtime,
        training={"steps_per_iteration": 1},
        captioning={"min_verify_probability": 0.2, "batch_size": 5, "max_round_trip_rank": 66},
    )
    run = runner.open_run(config)
    [checkpoint] = copied(run, finished, CHECKPOINT)
    negatives = mine(run, 0, checkpoint)
    samples = caption(run, 1, negatives, checkpoint, [])
    evaluate_stage(run, "iter_0", checkpoint, "val", 0)
    train(run, 1, checkpoint, [samples], negatives)
    assert not [*(directory / "run" / ".work").glob("shares*")]
    return {name: file_digests(directory / "run" / name) for name in NAMES}


@pytest.fixture
def census(monkeypatch: pytest.MonkeyPatch) -> Iterator[Census]:
    with counted(monkeypatch) as count:
        yield count


@pytest.mark.full
def test_shares_put_together_have_the_bytes_of_one_process(
    census: Census, small: Any, finished: Path, tmp_path: Path
) -> None:
    """And while processes work, this one holds no model."""
    one, two = (artifacts(small, finished, tmp_path / str(num), num) for num in (1, 2))
    assert one == two
    assert len(census.at_launch) >= 6 and set(census.at_launch) == {0}
    assert max(census.most.values()) == 1
    spent = [
        {row["stage"]: row for row in Costs(tmp_path / str(num) / "run").read()} for num in (1, 2)
    ]
    for name in NAMES:
        alone, apart = (rows[name] for rows in spent)
        assert (alone["processes"], apart["processes"]) == (1, 2)
        for counter in COUNTERS:
            assert apart[counter] == alone[counter]


@pytest.mark.full
def test_a_run_is_evaluated_in_more_processes_on_grey_images_of_another_split(
    finished: Path,
) -> None:
    asked = {
        "experiment_dir": finished,
        "iterations": "1",
        "eval_dataset": "shapes_test",
        "ablate": "image",
    }
    one, two = (evaluate(EvalConfig(**asked, num_processes=num)) for num in (1, 2))
    assert one == two and one[0]["split"] == "shapes_test" and one[0]["ablated"] == "image"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "there is no such file"),
        ("- 1", "holds no settings"),
        ("num_processes: [", "while parsing"),
        ("num_processes: many", "'many'"),
        ("num_processes: 0", "is 0, not"),
    ],
)
def test_an_accelerate_config_that_does_not_say_how_many_is_named(
    text: str | None, says: str, tmp_path: Path
) -> None:
    file = tmp_path / "accelerate.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=says) as caught:
        launcher.num_processes(Runtime(accelerate_config=file))
    assert str(file) in str(caught.value) and "--num_processes N" in str(caught.value)


def test_an_accelerate_config_says_how_many() -> None:
    file = ROOT / "configs/accelerate/nodes_2.yaml"
    assert launcher.num_processes(Runtime(accelerate_config=file)) == 16
    assert launcher.num_processes(Runtime(accelerate_config=file, num_processes=2)) == 2


def test_two_machines_get_one_world_with_their_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's own launcher, Accelerate's default, would make one of each machine."""
    slurm = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "64"}
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    zero = Runtime(num_processes=16, deepspeed=ROOT / "configs/deepspeed/zero2.json")
    line = " ".join(launcher.srun_wrap(launcher.launch_command(zero, nodes=2)))
    assert "--deepspeed_multinode_launcher standard" in line and "--cpus-per-task=64" in line
    assert "--num_machines 2" in line and "--ntasks-per-node=1" in line
    ddp = " ".join(launcher.launch_command(Runtime(num_processes=16), nodes=2))
    assert "deepspeed" not in ddp


@pytest.mark.parametrize("kind", ["vllm", "qwen2_vl"])
def test_an_engine_that_takes_gpus_by_itself_is_the_drivers(
    kind: str, small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's would be on the first GPU in every process."""
    config = small(tmp_path, foundation={"type": kind}, runtime={"num_processes": 2})
    run = RunContext(config, Store(tmp_path), config.data.build(None))
    engine = SimpleNamespace(input_kind="images")
    monkeypatch.setattr(run.models, "captioner", lambda *_: engine)
    captioner: Any = run.captioner(lambda: None)  # type: ignore[arg-type,return-value]
    assert isinstance(captioner, DistributedCaptioner) == (kind == "qwen2_vl")
    assert kind == "qwen2_vl" or captioner.captioner is engine


def command(tmp_path: Path, config: Any) -> list[str]:
    """`train_iterative.py` with these settings."""
    path = tmp_path / f"{config.directory.name}.yaml"
    path.write_text(yaml.safe_dump(config.to_json()))
    flags = ["--config", str(path), "--experiment_dir", str(config.directory)]
    return [sys.executable, str(ROOT / "train_iterative.py"), *flags]


def processes(driver: int) -> Iterator[tuple[int, str]]:
    """Numbers and command lines of all that a process started, and what that started."""
    children: dict[int, list[int]] = {}
    lines: dict[int, str] = {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((directory / "stat").read_text().rpartition(")")[2].split()[1])
            lines[int(directory.name)] = (directory / "cmdline").read_text().replace("\0", " ")
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(parent, []).append(int(directory.name))
    left = [driver]
    while left:
        for pid in children.get(left.pop(), []):
            left.append(pid)
            yield pid, lines[pid]


def are_gone(pids: Iterable[int]) -> None:
    """None of them is left a moment after the command's end. One that has ended is there until its
    parent, which may be the system's first process by then, has asked for its exit code."""
    deadline = time.monotonic() + A_MOMENT
    left = {*pids}
    while left := {pid for pid in left if _runs(pid)}:
        assert time.monotonic() < deadline, f"processes were left behind: {sorted(left)}"
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def kill_one(flags: list[str]) -> str:
    """Start the command and kill -9 one of its workers; what the command then says."""
    with subprocess.Popen(
        flags, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as driver:
        deadline, victims, others = time.monotonic() + LONG, list[int](), list[int]()
        while not victims:
            assert driver.poll() is None and time.monotonic() < deadline, "nothing to kill came"
            there = [*processes(driver.pid)]
            others = [pid for pid, _ in there]
            victims = [
                pid
                for pid, line in there
                if "cirloop.distributed.worker" in line and "launch" not in line
            ]
            time.sleep(0.02)
        os.kill(victims[-1], signal.SIGKILL)
        began = time.monotonic()
        _, said = driver.communicate(timeout=SOON)
        assert time.monotonic() - began < SOON and driver.returncode == 2, said
    are_gone(others)
    return said


def run(flags: list[str]) -> None:
    done = subprocess.run(flags, capture_output=True, text=True, timeout=LONG, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.full
def test_a_killed_share_ends_the_stage_which_is_resumed_to_the_bytes_of_one_process(
    small: Any, tmp_path: Path
) -> None:
    def settings(name: str, num: int) -> Any:
        training, runtime = {"iteration_0_steps": 0}, {"num_processes": num, "embed_batch_size": 8}
        return small(
            tmp_path / name,
            num_iterations=0,
            training=training,
            runtime=runtime,
            evaluation={"evaluate_base": False},
        )

    flags = command(tmp_path, settings("two", 2))
    said = kill_one(flags)
    assert "error: embed shapes/val queries: the processes ended with exit code 1" in said
    assert "--auto_resume" in said and "Traceback" not in said.partition("error: embed")[2]
    run([*flags, "--auto_resume"])
    run(command(tmp_path, settings("one", 1)))
    assert (tmp_path / "two/evaluation_iter_0.json").read_bytes() == (
        tmp_path / "one/evaluation_iter_0.json"
    ).read_bytes()


@pytest.mark.full
@pytest.mark.parametrize(
    "launcher",
    [
        ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
        ["accelerate.commands.launch", "--num_processes", "2", "--cpu"],
    ],
)
def test_under_a_launcher_the_command_says_what_to_use_instead(
    launcher: list[str], tmp_path: Path
) -> None:
    script = [str(ROOT / "train_iterative.py"), "--experiment_dir", str(tmp_path / "run")]
    # with --cpu accelerate starts one process, as its MPI would two
    of_mpi = {"RANK": "1", "WORLD_SIZE": "2"} if launcher[0].startswith("accelerate") else {}
    done = python("-m", *launcher, *script, **of_mpi)
    assert done.returncode != 0
    assert "of 2 of a launcher" in done.stderr and "python " + script[0] in done.stderr
    assert "--num_processes 2" in done.stderr and not (tmp_path / "run").exists()
