"""Two processes of a stage of which one alone has trouble: `torchrun ... bad_steps.py CACHE
OUTPUT`.

Each writes which steps were left out and after which it stopped; then one of them runs out of
memory and says so.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from pathlib import Path

import torch

from cirloop.distributed.worker import create_accelerator
from cirloop.monitoring import preemption
from cirloop.types import UserError
from tests.training.test_bad_steps import narrow, until
from tests.training.test_trainer import STEPS, trainer_of


def main() -> None:
    cache, output = map(Path, sys.argv[1:])
    rank = create_accelerator().process_index
    trainer = trainer_of(output / "a", cache, max_skipped_batches=1)
    now = [0]

    def poison(grad: torch.Tensor) -> torch.Tensor:
        return grad * math.nan if rank == 1 and now[0] == 1 else grad

    next(weight for name, weight in trainer.parameters.items() if "lora_B" in name).register_hook(
        poison
    )
    trainer.run(until(STEPS, lambda step: now.__setitem__(0, step)))
    found = {"skipped": [row["step"] for row in trainer.log if "ids" in row]}

    trainer = trainer_of(output / "b", cache)
    with preemption.handle_sigterm():
        try:
            trainer.run(
                until(
                    STEPS,
                    lambda step: (
                        os.kill(os.getpid(), signal.SIGTERM) if rank == 1 == step - 1 else None
                    ),
                )
            )
        except preemption.GracefulStop:
            found["stopped"] = [path.name for path in (output / "b" / "work").iterdir()]
    (output / f"rank_{rank}.json").write_text(json.dumps(found))

    trainer = trainer_of(output / "c", cache)
    with narrow(trainer, 3 if rank == 1 else 100):
        try:
            trainer.run(lambda steps: steps)
        except UserError as error:
            (output / "said.txt").write_text(str(error))
            raise


if __name__ == "__main__":
    main()
