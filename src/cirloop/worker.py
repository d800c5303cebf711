"""A training stage inside one process: in the driver's, or as `python -m cirloop.worker JOB` under a launcher.

Rows come from files: the job names the run directory's artifacts, and rank 0 writes the checkpoint.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from cirloop.artifacts import Artifact, write_json
from cirloop.backbones.features import VisionFeatures
from cirloop.config import from_json
from cirloop.data.sources import Sources
from cirloop.report.terminal import progress, start_logging
from cirloop.rows import read_augmented, read_mined
from cirloop.training.batches import Batches
from cirloop.training.trainer import Trainer, seed_of
from cirloop.types import QueryId, TrainSplit

logger = logging.getLogger("cirloop.worker")  # also when run as __main__


def _artifact(job: dict[str, Any], name: str) -> Artifact:
    return Artifact(name, Path(job["run"]) / name, "")


def accelerator() -> Accelerator:
    """Accelerate as the launcher set it up; gloo where there is no GPU."""
    import torch

    if torch.cuda.is_available():
        return Accelerator()
    handlers = [InitProcessGroupKwargs(backend="gloo")] if "RANK" in os.environ else []
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"  # Accelerate drops DeepSpeed if told cpu=True
    return Accelerator(cpu=not deepspeed, kwargs_handlers=handlers)


def groups_of(data: TrainSplit, kind: str) -> dict[QueryId, str] | None:
    """The group of each human query that batches keep together."""
    queries = [(t.query, t.target) for t in data.triplets]
    if kind == "category":
        return {query.id: data.categories[target] for query, target in queries}
    if kind == "group":
        return {query.id: " ".join(sorted({query.reference, *data.groups[query.id]})) for query, _ in queries}
    return None


def train(job: dict[str, Any]) -> None:
    """Train one stage and write `job["output"]`: adapter, adapter config and training log."""
    config = from_json(Path(job["run"]) / "config.json")
    data = config.data.build(Sources(config.data_dir, Path(job["cache"]), progress, config.train_dir)).train
    settings, iteration = config.training, int(job["iteration"])
    accelerate = accelerator()
    seed = seed_of(config.seed, "train", iteration)
    backbone: Any = config.model.build(Path(job["parent"]) if job["parent"] else None)
    backbone.make_trainable(settings, seed_of(config.seed, "lora"))
    augmented = [row for name in job["augmented"] for row in read_augmented(_artifact(job, name))]
    mined = read_mined(_artifact(job, job["negatives"])) if job["negatives"] else []
    batches = Batches(
        data.triplets,
        augmented,
        mined,
        settings.batch_size,
        settings.augmented_share,
        settings.num_negatives,
        seed,
        settings.unique_targets,
        groups_of(data, settings.group_batches),
    )
    features = VisionFeatures(backbone, data.images, Path(job["cache"]) / "vision")
    trainer = Trainer(
        backbone, features, batches, settings, job["steps"], seed, job["key"], Path(job["workspace"]),
        config.runtime.save_every, accelerate,
    )  # fmt: skip
    main = accelerate.is_main_process
    if main and accelerate.num_processes > 1:
        logger.info("training in %d processes, %s", accelerate.num_processes, accelerate.distributed_type.value)
    rows = trainer.run(lambda steps: progress(steps, f"train iteration {iteration}") if main else steps)
    accelerate.wait_for_everyone()
    if main:
        output = Path(job["output"])
        backbone.save_adapter(output)
        write_json(output / "training_log.json", {"schema": 1, "steps": job["steps"], "rows": rows})
    accelerate.free_memory()


def main() -> None:
    start_logging()
    train(json.loads(Path(sys.argv[1]).read_text("utf-8")))
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
