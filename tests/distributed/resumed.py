"""A stage that is stopped after two steps and resumed, under `accelerate launch`: `... resumed.py
CACHE OUTPUT DTYPE [STOPPED]`.

Writes whether the log and all that a step checkpoint holds are then those of an unbroken stage, and
the losses of a stage resumed from STOPPED, which another strategy left.
"""

from __future__ import annotations

import faulthandler
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed

from cirloop.distributed.worker import create_accelerator
from cirloop.training.gradient_engine import GradientEngine
from cirloop.training.step_state import SCALE
from cirloop.training.trainer import Trainer
from tests.distributed.sharded import trained
from tests.training.test_trainer import STEPS

backward = GradientEngine.backward
LAST = 2
"""Steps after which a stage is stopped."""


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return [name for name in {*one, *other} if not torch.equal(one[name], other[name])]


def main() -> None:
    faulthandler.dump_traceback_later(int(os.environ.get("TIMEOUT", "400")), exit=True)
    cache, output = map(Path, sys.argv[1:3])
    dtype, *others = sys.argv[3:]
    accelerate = create_accelerator()
    if dtype == "float16":  # which DeepSpeed refuses on most processors, though torch has it there
        from deepspeed.accelerator import get_accelerator

        get_accelerator().is_fp16_supported = lambda: True

    def train(name: str, last: int | None = None) -> Trainer:
        return trained(output / name, cache, last, model={"dtype": dtype})

    whole = train("whole")
    state = whole.state.gather()
    train("broken", LAST)
    if accelerate.is_main_process:
        shutil.copytree(output / "broken", output / "stopped")
    accelerate.wait_for_everyone()
    with mock.patch.object(
        GradientEngine, "backward", autospec=True, side_effect=backward
    ) as calls:
        resumed = train("broken")
    row = {
        "steps": [call.args[1] for call in calls.call_args_list],
        "losses": [step["loss"] for step in whole.log],
        "equal_log": resumed.log == whole.log,
        "differing": differing(state, resumed.state.gather()),
        "dtypes": sorted({str(state[name].dtype) for name in state if ".lora_" in name}),
        "taken": resumed.state.num_taken(),
        "scale": {name: float(state[name]) for name in state if name.startswith(SCALE)},
    }
    if others:
        if accelerate.is_main_process:
            shutil.copytree(others[0], output / "other")
        accelerate.wait_for_everyone()
        row["other"] = [step["loss"] for step in train("other").log]
    (output / f"rank_{accelerate.process_index}.json").write_text(json.dumps(row))
    assert len(whole.log) == STEPS
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
