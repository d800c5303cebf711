"""The launcher: runs a job in this process, or in workers under `accelerate launch`.

The driver waits for the workers to exit, which frees their GPU memory. A worker that hangs or
crashes fails the stage, not the run. Accelerate's launcher ends the other workers when one has
failed.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from cirloop.config.runtime import Runtime
from cirloop.distributed import jobs
from cirloop.distributed.jobs import Job, ShardJob, TrainJob
from cirloop.io import parse
from cirloop.monitoring import events, preemption
from cirloop.reproducibility import needed_variables
from cirloop.types import UserError

NODE = "NODE"
"""Stands for a machine's number, which only the machine knows."""
POLL_S = 0.5
"""Seconds between two looks at the steps done, and whether the run was asked to stop."""
TERMINATE_S = 40
"""Seconds that a launcher told to end has for it; it gives its processes 30."""


def num_processes(runtime: Runtime) -> int:
    """Return the number of processes of a job, from the setting or the accelerate config.

    Raises UserError where the config gives no valid number.
    """
    file = runtime.accelerate_config
    if runtime.num_processes > 1 or file is None:
        return runtime.num_processes
    try:
        settings = parse.read_yaml(file)
    except UserError as error:
        settings = None
        reason = str(error)
    else:
        reason = "it holds no settings"
    num = settings.get("num_processes", 1) if isinstance(settings, dict) else None
    if not isinstance(num, int) or num < 1:
        reason = (
            f"num_processes is {num!r}, not a number of at least 1"
            if isinstance(settings, dict)
            else reason
        )
        raise UserError(
            f"--accelerate_config {file}: {reason}. Give a file of `accelerate config`, or"
            " --num_processes N."
        )
    return num


def device_warnings(runtime: Runtime) -> list[str]:
    """Return warnings about processes without a device of their own on this machine.

    Raises UserError where a machine has GPUs, but fewer than processes.
    """
    import torch

    per_machine = -(-num_processes(runtime) // num_nodes())
    if per_machine == 1:
        return []
    if torch.cuda.is_available():
        if per_machine > torch.cuda.device_count():
            raise UserError(
                f"--num_processes: {per_machine} processes on this machine and"
                f" {torch.cuda.device_count()} GPUs; each process needs one. Give --num_processes"
                f" {torch.cuda.device_count()} a machine, or more GPUs."
            )
        return []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [
        f"{per_machine} processes share {cores} CPU cores, and there is no GPU: each loads a model"
        " of its own, and together they are hardly faster than one. Leave --num_processes out"
        " unless you mean it."
    ]


def run_training(job: TrainJob, runtime: Runtime) -> None:
    """Run a training job and return when its output exists. Raises GracefulStop where the run was
    asked to stop before."""
    if (
        runtime.num_processes == 1
        and runtime.accelerate_config is None
        and runtime.deepspeed is None
    ):
        from cirloop.distributed.worker import train

        train(job)
        return
    _run(job, runtime, worker_environment(runtime.deepspeed), "the training stage's processes")
    if not job.output.exists():
        raise preemption.GracefulStop


def run_sharded(job: ShardJob, runtime: Runtime) -> None:
    """Run a job of which each process does its shard, and return when all have finished.

    On a CPU each worker has as many threads as this process: their number changes the last bits of
    a result.
    """
    import torch

    on_gpu = torch.cuda.is_available()
    threads = {} if on_gpu else {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    without_deepspeed = runtime.model_copy(update={"deepspeed": None})
    _run(job, without_deepspeed, worker_environment() | threads, f"{job.title}: the processes")


def run_module(module: str, job: Job, runtime: Runtime, workers: str) -> None:
    """Run a job of `module`, which serves it (`process.serve`) when it is run with the job's file,
    and return when all processes have finished, all of them on this machine. `workers` names them
    in messages."""
    command = [*launch_command(runtime, nodes=1), "-m", module, str(job.file)]
    _run_command(command, job, worker_environment(), workers)


def _run(
    job: TrainJob | ShardJob, runtime: Runtime, environment: dict[str, str], workers: str
) -> None:
    command = [*launch_command(runtime), "-m", "cirloop.distributed.worker", str(job.file)]
    _run_command(srun_wrap(command), job, environment, workers)


def _run_command(
    command: Sequence[str], job: Job, environment: dict[str, str], workers: str
) -> None:
    """Launch the workers of a job and wait for them; they have ended when this returns or raises.

    Raises UserError when the workers fail, GracefulStop when the run is asked to stop. Training
    workers then end by themselves, after the current step; others are terminated.
    """
    for stale in ("error.txt", "stop", "steps.jsonl"):  # of an attempt that was stopped
        (job.directory / stale).unlink(missing_ok=True)
    jobs.write(job)
    events.emit("processes", working=True)
    try:
        with subprocess.Popen(
            command, env=environment, stdout=2
        ) as child:  # standard output is for tables
            try:
                code = _wait(child, job)
            finally:
                if child.poll() is None:
                    child.terminate()
                    with suppress(subprocess.TimeoutExpired):
                        child.wait(TERMINATE_S)
                    child.kill()
    finally:
        events.emit("processes", working=False)
    if code:
        if job.error.exists():  # what one of them said to the user
            raise UserError(job.error.read_text("utf-8"))
        # Maybe they alone got the signal.
        if preemption.stop_requested() or (isinstance(job, TrainJob) and job.stop_file.exists()):
            raise preemption.GracefulStop
        outcome = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        if not isinstance(job, TrainJob | ShardJob):
            raise UserError(f"{workers} ended with {outcome}; their output above says why.")
        raise UserError(
            f"{workers} ended with {outcome}; their output above and in logs/ says why. What was"
            " finished is kept: go on with --auto_resume."
        )


def _wait(child: subprocess.Popen[bytes], job: Job) -> int:
    """Return the exit code of `child`, and emit its steps meanwhile.

    Raises GracefulStop when a run that does not train is asked to stop.
    """
    place = 0
    code = None
    while code is None:
        with suppress(subprocess.TimeoutExpired):
            code = child.wait(POLL_S)
        if isinstance(job, TrainJob):
            place = _emit_steps(job.rows, place)
        if preemption.stop_requested() and code is None:
            if not isinstance(job, TrainJob):
                raise preemption.GracefulStop
            job.stop_file.touch()
    return code


def _emit_steps(rows: Path, place: int) -> int:
    """Emit the rows of the file `rows` from the byte `place` on, and return where they end."""
    if not rows.exists():
        return place
    with rows.open("rb") as file:
        file.seek(place)
        for line in file:
            if line.endswith(b"\n"):  # else it is being written
                events.emit("step", row=json.loads(line))
                place += len(line)
    return place


def refuse_nested_launch(argv: Sequence[str]) -> None:
    """Raise UserError in a process that a launcher started among others: the driver starts its
    own."""
    num = int(os.environ.get("WORLD_SIZE", "1"))
    if "RANK" in os.environ and num > 1:
        flags = (
            []
            if any(flag.startswith("--num_processes") for flag in argv)
            else ["--num_processes", str(num)]
        )
        command = shlex.join(["python", *argv, *flags])
        raise UserError(
            f"this is process {os.environ['RANK']} of {num} of a launcher (accelerate launch,"
            " torchrun, deepspeed). Start the command by itself; it launches its own processes:\n "
            f" {command}\nAn accelerate config goes with --accelerate_config FILE, a DeepSpeed JSON"
            " with --deepspeed FILE."
        )


def launch_command(runtime: Runtime, nodes: int | None = None) -> list[str]:
    """Return the command that launches the Python arguments after it in several processes, on
    `nodes` machines, by default all of the Slurm job."""
    flags = _flags(runtime, nodes or num_nodes())
    return [sys.executable, "-m", "cirloop.distributed.accelerate_launch", *flags]


def num_nodes() -> int:
    """Return the number of machines of the Slurm job that this process is in; 1 outside of
    Slurm."""
    return int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))


def srun_wrap(command: Sequence[str]) -> list[str]:
    """Wrap a launcher's command so that it runs once on each machine of a Slurm job.

    A launcher that fails ends the others.
    """
    num = num_nodes()
    if num == 1:
        return [*command]
    tasks = [f"--nodes={num}", f"--ntasks={num}", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    cores = os.environ.get("SLURM_CPUS_PER_TASK")  # srun does not take it from its job
    tasks += [f"--cpus-per-task={cores}"] if cores else []
    line = shlex.join(command).replace(NODE, '"$SLURM_NODEID"')
    return ["srun", *tasks, "bash", "-c", f"exec {line}"]


def worker_environment(deepspeed: Path | None = None) -> dict[str, str]:
    """Return the environment of a worker: it can import this package, and DeepSpeed knows where
    there is no GPU."""
    import torch

    from cirloop.backbones.tensor_cache import RUN_STARTED_AT, RUN_STARTED_VARIABLE

    paths = os.pathsep.join(
        filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")])
    )
    cpu = (
        {"DS_ACCELERATOR": "cpu"} if deepspeed is not None and not torch.cuda.is_available() else {}
    )
    started = {RUN_STARTED_VARIABLE: str(RUN_STARTED_AT)}
    return {**os.environ, **needed_variables(), **started, "PYTHONPATH": paths, **cpu}


def _flags(runtime: Runtime, nodes: int) -> list[str]:
    flags = []
    config = runtime.accelerate_config
    deepspeed = runtime.deepspeed
    if config is not None:
        flags += ["--config_file", str(config)]
    if runtime.num_processes > 1 or config is None:  # else the file says how many
        flags += ["--num_processes", str(runtime.num_processes)]
    if nodes > 1:
        port = 20000 + int(os.environ["SLURM_JOB_ID"]) % 10000
        flags += ["--num_machines", str(nodes), "--machine_rank", NODE]
        flags += ["--main_process_ip", socket.gethostname(), "--main_process_port", str(port)]
    elif config is None:
        flags += ["--num_machines", "1"]
    if config is None:
        flags += ["--mixed_precision", "no", "--dynamo_backend", "no"]
        flags += [] if deepspeed or runtime.num_processes == 1 else ["--multi_gpu"]
    if deepspeed is not None:
        flags += ["--use_deepspeed", "--deepspeed_config_file", str(deepspeed)]
        if nodes > 1:  # else Accelerate asks DeepSpeed's own launcher, which knows one machine
            flags += ["--deepspeed_multinode_launcher", "standard"]
    return flags
