"""Where a training stage runs: in this process, or in a child under `accelerate launch`.

A child's exit is the barrier: its memory comes back when it ends, and a collective that hangs ends a stage, not a run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from cirloop.types import UserError


def training(job: dict[str, Any], num_processes: int, accelerate_config: Path | None, deepspeed: Path | None) -> None:
    """Run the training `job` and return when its output is there."""
    if num_processes == 1 and accelerate_config is None and deepspeed is None:
        from cirloop.worker import train

        train(job)
        return
    spec = Path(job["workspace"]).parent / "job.json"
    spec.parent.mkdir(parents=True, exist_ok=True)
    spec.write_text(json.dumps(job), "utf-8")
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        *_flags(num_processes, accelerate_config, deepspeed),
    ]
    environment = dict(os.environ) | {
        "PYTHONPATH": os.pathsep.join(filter(None, [_source(), os.environ.get("PYTHONPATH")]))
    }
    if deepspeed is not None and not _has_gpu():
        environment["DS_ACCELERATOR"] = "cpu"
    done = subprocess.run([*command, "-m", "cirloop.worker", str(spec)], env=environment, check=False)
    if done.returncode:
        raise UserError(
            f"the training stage's processes ended with exit code {done.returncode}; their output above says why. "
            "What was finished is kept: go on with --auto_resume."
        )


def _flags(num_processes: int, accelerate_config: Path | None, deepspeed: Path | None) -> list[str]:
    flags = []
    if accelerate_config is not None:
        flags += ["--config_file", str(accelerate_config)]
    if num_processes > 1 or accelerate_config is None:  # else the file says how many
        flags += ["--num_processes", str(num_processes)]
    if accelerate_config is None:
        flags += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        flags += [] if deepspeed or num_processes == 1 else ["--multi_gpu"]
    if deepspeed is not None:
        flags += ["--use_deepspeed", "--deepspeed_config_file", str(deepspeed)]
    return flags


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _source() -> str:
    return str(Path(__file__).parent.parent)
