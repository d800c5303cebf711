"""Where a job runs: in this process, or in children under `accelerate launch`.

The children's exit is the barrier: their memory comes back when they end, and what hangs or dies ends a stage, not a
run. Accelerate's launcher ends the others when one has failed.
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
from typing import Any

from cirloop import reading, relay, stopping
from cirloop.runtime import Runtime
from cirloop.silence import Silence
from cirloop.types import UserError

NODE = "NODE"
"""Stands for a machine's number, which only the machine knows."""
LOOK = 0.5
"""Seconds between two looks at the processes, and whether the run was asked to stop."""
PATIENCE = 40
"""Seconds that a launcher told to end has for it; it gives its processes 30."""


def processes(runtime: Runtime) -> int:
    """How many do a job; an accelerate config says so where the setting does not. Raises UserError where it cannot."""
    file = runtime.accelerate_config
    if runtime.num_processes > 1 or file is None:
        return runtime.num_processes
    try:
        told = reading.yaml_file(file)
    except UserError as error:
        told, why = None, str(error)
    else:
        why = "it holds no settings"
    num = told.get("num_processes", 1) if isinstance(told, dict) else None
    if not isinstance(num, int) or num < 1:
        why = f"num_processes is {num!r}, not a number of at least 1" if isinstance(told, dict) else why
        raise UserError(f"--accelerate_config {file}: {why}. Give a file of `accelerate config`, or --num_processes N.")
    return num


def crowded(runtime: Runtime) -> list[str]:
    """What is to be said of processes without a device of their own on this machine. Raises UserError on GPUs, of which
    each process needs one."""
    import torch

    per_machine = -(-processes(runtime) // num_nodes())
    if per_machine == 1:
        return []
    if torch.cuda.is_available():
        if per_machine > torch.cuda.device_count():
            raise UserError(
                f"--num_processes: {per_machine} processes on this machine and {torch.cuda.device_count()} GPUs; each "
                f"process needs one. Give --num_processes {torch.cuda.device_count()} a machine, or more GPUs."
            )
        return []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [
        f"{per_machine} processes share {cores} CPU cores, and there is no GPU: each loads a "
        "model of its own, and together they are hardly faster than one. Leave --num_processes out unless you mean it."
    ]


def training(job: dict[str, Any], runtime: Runtime) -> None:
    """Run the training `job` and return when its output is there. Raises Stopped where it was asked to stop before."""
    if runtime.num_processes == 1 and runtime.accelerate_config is None and runtime.deepspeed is None:
        from cirloop.worker import train

        train(job)
        return
    spec = Path(job["workspace"]).parent / "job.json"
    order = spec.with_name("stop")
    order.unlink(missing_ok=True)  # of an attempt that was stopped
    given = environment(runtime.deepspeed)
    _run(job | {"order": str(order)}, spec, runtime, given, "the training stage's processes", order)
    if not Path(job["output"]).exists():
        raise stopping.Stopped


def shares(job: dict[str, Any], spec: Path, runtime: Runtime, who: str) -> None:
    """Run a `job` of which each process does its share, and return when all have. Its file is `spec`.

    On a CPU each has as many threads as this process: their number changes the last bits of a result.
    """
    import torch

    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    _run(job, spec, runtime.model_copy(update={"deepspeed": None}), environment() | threads, who)


def _run(
    job: dict[str, Any], spec: Path, runtime: Runtime, given: dict[str, str], who: str, order: Path | None = None
) -> None:
    """Raises UserError when the children fail, Stopped when the run is asked to stop. Those that take an `order`, a
    file, then end by themselves, after the step that they are at; others are ended. However this ends, they have too.
    """
    spec.parent.mkdir(parents=True, exist_ok=True)
    error = spec.with_name("error.txt")
    error.unlink(missing_ok=True)
    told = {"driver": [socket.gethostname(), os.getpid()], "error": str(error)}
    spec.write_text(json.dumps(job | told), "utf-8")
    command = on_all_nodes([*launcher(runtime), "-m", "cirloop.worker", str(spec)])
    heard = relay.Heard()
    given = given | {relay.VARIABLE: "1"}
    with subprocess.Popen(command, env=given, stdout=heard.end, stderr=heard.end) as child:
        heard.start()
        ended = False
        try:
            code, ended = _ended(child, order, Silence(spec.parent, runtime.timeout_minutes), who, heard), True
        finally:
            if child.poll() is None:
                child.terminate()
                with suppress(subprocess.TimeoutExpired):
                    child.wait(PATIENCE)
                child.kill()
            heard.close(aside=not ended)  # why they were ended is said elsewhere
    if code:
        if error.exists():  # what one of them said to the user
            raise UserError(error.read_text("utf-8"))
        if stopping.asked() or (order is not None and order.exists()):  # they got the signal, and maybe they alone
            raise stopping.Stopped
        said = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        raise UserError(
            f"{who} ended with {said}; their output above says why. What was finished is kept: go on with "
            "--auto_resume."
        )


def _ended(child: subprocess.Popen[bytes], order: Path | None, silence: Silence, who: str, heard: relay.Heard) -> int:
    """The exit code of `child`. Raises UserError where its processes stand still, and Stopped when the run is asked to
    stop and there is no `order` to give."""
    while True:
        with suppress(subprocess.TimeoutExpired):
            return child.wait(LOOK)
        heard.pass_on()
        if stopping.asked():
            if order is None:
                raise stopping.Stopped
            order.touch()
        if silence.too_long():
            raise UserError(
                f"{who}: none has moved for {silence.minutes:g} minutes, so they were ended. One may hang in a "
                "collective, a driver or a file system. What was finished is kept: go on with --auto_resume, with a "
                "larger --runtime.timeout_minutes if they only were slow."
            )


def alone(argv: Sequence[str]) -> None:
    """Raises UserError in a process that a launcher started among others: the driver is one, and starts its own."""
    num = int(os.environ.get("WORLD_SIZE", "1"))
    if "RANK" in os.environ and num > 1:
        flags = [] if any(flag.startswith("--num_processes") for flag in argv) else ["--num_processes", str(num)]
        command = shlex.join(["python", *argv, *flags])
        raise UserError(
            f"this is process {os.environ['RANK']} of {num} of a launcher (accelerate launch, torchrun, deepspeed). "
            f"Start the command by itself; it launches its own processes:\n  {command}\n"
            "An accelerate config goes with --accelerate_config FILE, a DeepSpeed JSON with --deepspeed FILE."
        )


def launcher(runtime: Runtime) -> list[str]:
    """The command that launches the Python arguments after it in several processes."""
    return [sys.executable, "-m", "accelerate.commands.launch", *_flags(runtime)]


def num_nodes() -> int:
    """Machines of the Slurm job that this process is in; 1 outside of Slurm."""
    return int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))


def on_all_nodes(command: Sequence[str]) -> list[str]:
    """The command of a launcher, once on each machine of a Slurm job. One that fails ends the others."""
    num = num_nodes()
    if num == 1:
        return [*command]
    tasks = [f"--nodes={num}", f"--ntasks={num}", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    line = shlex.join(command).replace(NODE, '"$SLURM_NODEID"')
    return ["srun", *tasks, "bash", "-c", f"exec {line}"]


def environment(deepspeed: Path | None = None) -> dict[str, str]:
    """A child's: this package can be imported, and DeepSpeed knows where there is no GPU."""
    import torch

    paths = os.pathsep.join(filter(None, [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")]))
    cpu = {"DS_ACCELERATOR": "cpu"} if deepspeed is not None and not torch.cuda.is_available() else {}
    return {**os.environ, "PYTHONPATH": paths, **cpu}


def _flags(runtime: Runtime) -> list[str]:
    flags, config, deepspeed = [], runtime.accelerate_config, runtime.deepspeed
    if config is not None:
        flags += ["--config_file", str(config)]
    if runtime.num_processes > 1 or config is None:  # else the file says how many
        flags += ["--num_processes", str(runtime.num_processes)]
    if num_nodes() > 1:
        port = 20000 + int(os.environ["SLURM_JOB_ID"]) % 10000
        flags += ["--num_machines", str(num_nodes()), "--machine_rank", NODE]
        flags += ["--main_process_ip", socket.gethostname(), "--main_process_port", str(port)]
    elif config is None:
        flags += ["--num_machines", "1"]
    if config is None:
        flags += ["--mixed_precision", "no", "--dynamo_backend", "no"]
        flags += [] if deepspeed or runtime.num_processes == 1 else ["--multi_gpu"]
    if deepspeed is not None:
        flags += ["--use_deepspeed", "--deepspeed_config_file", str(deepspeed)]
    return flags
