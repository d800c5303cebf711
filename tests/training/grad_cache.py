"""Gradients of one step by gradient caching, and of the same chunks with their graphs kept, in as
many processes as run it: `torchrun --nproc_per_node 2 tests/training/grad_cache.py CACHE OUTPUT`.
Dropout is on."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from cirloop.training.config import BradleyTerry, InfoNCE, LossPart, LossSum, TripletHinge
from cirloop.training.gradient_engine import seed_of
from cirloop.training.trainer import Trainer
from tests.training.test_trainer import trainer_of

LOSSES = {
    "info_nce": InfoNCE(temperature=0.05),
    "info_nce masked": InfoNCE(temperature=0.05, mask_margin=0.1),
    "triplet": TripletHinge(margin=0.2),
    "bradley_terry": BradleyTerry(temperature=0.1),
    "sum": LossSum(
        parts=(LossPart(weight=0.5, loss=InfoNCE()), LossPart(weight=2.0, loss=BradleyTerry()))
    ),
}
CHUNK = 3


def gradients(cache: Path, loss: Any) -> float:
    """Largest difference between the two gradients, relative to the gradient's norm, over all
    weights."""
    with tempfile.TemporaryDirectory() as work:
        trainer = trainer_of(Path(work), cache, loss=loss, grad_cache_chunk_size=CHUNK)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(trainer.parameters.items()):
            if "lora_B" in name:
                parameter.normal_(std=0.02, generator=torch.Generator().manual_seed(number))
    trainer.engine.backward(0)
    cached = [p.grad.clone() for p in trainer.parameters.values() if p.grad is not None]
    trainer.optimizer.zero_grad()
    whole = with_graphs(trainer)
    assert len(cached) == len(whole) == len(trainer.parameters) and any(g.any() for g in whole)
    return max(
        float((a - b).norm() / b.norm().clamp(min=1e-8)) for a, b in zip(cached, whole, strict=True)
    )


def with_graphs(trainer: Trainer) -> list[torch.Tensor]:
    """The gradient of the whole batch at once: every chunk's graph is kept until the loss is
    there."""
    batch, rank = trainer.batches[0], trainer.accelerator.process_index
    queries, candidates = (
        trainer.engine._local_rows(items) for items, _ in trainer.engine._encoder_inputs(batch)
    )
    made: list[list[torch.Tensor]] = [[], []]
    number = 0
    for side, rows in zip(made, (queries, candidates), strict=True):
        for start in range(0, len(rows), CHUNK):
            torch.manual_seed(seed_of(trainer.engine.seed, 0, rank, number))
            side.append(
                trainer.backbone.module(trainer.engine._inputs_of(rows[start : start + CHUNK]))
            )
            number += 1
    trainer.engine._loss(batch, torch.cat(made[0]), torch.cat(made[1])).backward()
    grads = [p.grad for p in trainer.parameters.values() if p.grad is not None]
    if trainer.accelerator.num_processes > 1:
        for grad in grads:
            torch.distributed.all_reduce(grad)
            grad /= trainer.accelerator.num_processes
    return grads


def main() -> None:
    cache, output = map(Path, sys.argv[1:])
    found = {name: gradients(cache, loss) for name, loss in LOSSES.items()}
    found["processes"] = torch.distributed.get_world_size()
    (output / f"rank_{os.environ['RANK']}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
