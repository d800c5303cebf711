"""A stage whose weights lie in pieces on two processes, under `accelerate launch`: `... sharded.py
CACHE OUTPUT DTYPE`.

Writes the adapter, the log, what the training processes themselves make of some items, and the
largest share of the weights that one process held.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from deepspeed.utils import groups
from torch.distributed.tensor import DTensor

from cirloop.backbones import EmbedInput, LoraSettings
from cirloop.distributed.worker import create_accelerator, is_sharded
from cirloop.training.trainer import Trainer
from tests.training.test_trainer import STEPS, trainer_of

ITEMS = 8


class Stop(Exception):
    pass


def until(last: int) -> Any:
    def steps(numbers: Any) -> Any:
        for step in numbers:
            if step == last:
                raise Stop
            yield step

    return steps


def items(trainer: Trainer) -> list[EmbedInput]:
    batch = trainer.batches[0]
    asked = [EmbedInput(q.reference, q.text) for q in batch.queries]
    return asked[: ITEMS // 2] + [EmbedInput(image) for image in batch.candidates[: ITEMS // 2]]


def vectors(trainer: Trainer) -> Any:
    trainer.module.eval()
    with torch.no_grad():
        made = [trainer.module([trainer.engine._inputs_of([item])])[0] for item in items(trainer)]
    return torch.cat(made).cpu().numpy()


def share(trainer: Trainer) -> float:
    """Of the weights, the part that this process holds."""
    held = total = 0
    for p in trainer.backbone.root_module.parameters():
        whole = p.ds_numel if hasattr(p, "ds_numel") else p.numel()
        local = p.ds_tensor.numel() if hasattr(p, "ds_tensor") else p.numel()
        local = p.to_local().numel() if isinstance(p, DTensor) else local
        held, total = held + local, total + whole
    return held / total


def trained(work: Path, cache: Path, last: int | None = None, **more: Any) -> Trainer:
    """A trainer that has trained its stage, or its first `last` steps."""
    trainer = trainer_of(
        work, cache, checkpoint_every_steps=1, lora=LoraSettings(dropout=0.0), **more
    )
    with contextlib.suppress(Stop):
        trainer.run(until(last) if last is not None else lambda steps: steps)
    return trainer


def main() -> None:
    faulthandler.dump_traceback_later(int(os.environ.get("TIMEOUT", "200")), exit=True)
    cache, output = map(Path, sys.argv[1:3])
    accelerate = create_accelerator(hang_timeout_minutes=7)
    if accelerate.distributed_type.value == "DEEPSPEED":
        group = groups._get_data_parallel_group()
        assert group._get_backend(torch.device("cpu")).options._timeout.total_seconds() == 420
    trainer = trained(output, cache, model={"dtype": sys.argv[3]})
    assert is_sharded(trainer.accelerator)
    found = vectors(trainer)
    trainer.save_adapter(output / "adapter")
    again = vectors(trainer)
    assert np.array_equal(found, again), "saving changed the model"
    if accelerate.is_main_process:
        np.save(output / "vectors.npy", found)
    row = {"log": trainer.log, "share": share(trainer), "kind": accelerate.distributed_type.value}
    (output / f"rank_{accelerate.process_index}.json").write_text(json.dumps(row))
    assert len(trainer.log) == STEPS
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
