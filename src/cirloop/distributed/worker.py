"""The worker: runs a job in a process, training or a shard of embedding and captioning.

`python -m cirloop.distributed.worker JOB`, under a launcher; training runs in the driver too. It
reads its rows from the run directory's artifacts, and rank 0 writes the checkpoint.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, InitProcessGroupKwargs
from transformers.integrations import unset_hf_deepspeed_config

from cirloop.artifacts.atomic import write_json
from cirloop.artifacts.rows import read_augmented, read_mined
from cirloop.artifacts.store import Artifact
from cirloop.backbones.features import VisionCache
from cirloop.config.run import RunConfig, from_json
from cirloop.data.known_positives import known_positives
from cirloop.data.paths import DataPaths
from cirloop.distributed import jobs, process
from cirloop.distributed.jobs import ShardJob, TrainJob
from cirloop.distributed.sharded_worker import precompute_features, run_worker
from cirloop.monitoring import events, preemption, profiling
from cirloop.monitoring.console import progress
from cirloop.monitoring.costs import PROFILE
from cirloop.training.batches import BatchSampler
from cirloop.training.config import TrainingSettings
from cirloop.training.gradient_engine import seed_of
from cirloop.training.health import NonFiniteBatch
from cirloop.training.trainer import Trainer
from cirloop.types import ImageId, QueryId, TrainSplit, UserError
from cirloop.validation import ValidationReport

logger = logging.getLogger("cirloop.distributed.worker")  # also when run as __main__
BAD_BATCH = "bad_batch.json"


def create_accelerator(hang_timeout_minutes: float = 30) -> Accelerator:
    """Create the Accelerator as the launcher configured it, with gloo where there is no GPU.

    Processes wait for each other for `hang_timeout_minutes`. Raises UserError for FSDP other than
    FSDP2.
    """
    import torch

    fsdp = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if fsdp and os.environ.get("FSDP_VERSION") != "2":
        raise UserError(
            f"fsdp_version {os.environ.get('FSDP_VERSION')} in the accelerate config; set it to 2,"
            " as in configs/accelerate/fsdp2.yaml."
        )
    timeout = timedelta(minutes=hang_timeout_minutes)
    # Models are loaded whole and then cut, also under ZeRO-3: an adapter is put on and proven
    # before. transformers would cut them as it loads, with the configuration that Accelerate gives
    # it.
    os.environ["ACCELERATE_DEEPSPEED_ZERO3_INIT"] = "false"
    if torch.cuda.is_available():
        accelerate = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)])
    else:
        accelerate = _create_on_cpu(timeout, fsdp=fsdp)
    unset_hf_deepspeed_config()
    if accelerate.distributed_type == DistributedType.DEEPSPEED:
        _limit_zero(timeout)
    return accelerate


def _limit_zero(timeout: timedelta) -> None:
    """Let ZeRO's processes wait for each other as long as others do. It makes a group of its own,
    which would get torch's timeout: with NCCL 10 minutes."""
    from deepspeed.utils import groups
    from torch.distributed import new_group

    if groups._WORLD_GROUP is None:  # no public name
        groups._WORLD_GROUP = new_group(timeout=timeout)


def _create_on_cpu(timeout: timedelta, *, fsdp: bool) -> Accelerator:
    handlers = (
        [InitProcessGroupKwargs(backend="gloo", timeout=timeout)] if "RANK" in os.environ else []
    )
    # Accelerate drops DeepSpeed if told cpu=True.
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    accelerate = Accelerator(cpu=not deepspeed, kwargs_handlers=handlers)
    # Accelerate itself would take plain DDP here, though torch's FSDP2 has gloo.
    if fsdp and accelerate.num_processes > 1:
        accelerate.state.distributed_type = PartialState._shared_state["distributed_type"] = (
            DistributedType.FSDP
        )
        accelerate.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    return accelerate


def is_sharded(accelerate: Accelerator) -> bool:
    """Tell whether weights are sharded over the processes, so that a forward pass is collective."""
    plugin = accelerate.state.deepspeed_plugin
    return accelerate.distributed_type == DistributedType.FSDP or (
        plugin is not None and plugin.zero_stage == 3
    )


def images_of_steps(batches: BatchSampler, steps: int) -> list[ImageId]:
    """Return all images that the steps use, sorted."""
    images: set[ImageId] = set()
    for step in range(steps):
        batch = batches[step]
        images |= {*batch.candidates, *(query.reference for query in batch.queries)}
    return sorted(images)


def batch_groups(data: TrainSplit, kind: str) -> dict[QueryId, str] | None:
    """Return the group of each human query that batches keep together; None without groups."""
    queries = [(t.query, t.target) for t in data.triplets]
    if kind == "category":
        return {query.id: data.categories[target] for query, target in queries}
    if kind == "group":
        return {
            query.id: " ".join(sorted({query.reference, *data.groups[query.id]}))
            for query, _ in queries
        }
    return None


def train(job: TrainJob) -> None:
    """Train one stage and write `job.output`: adapter, adapter config and training log.

    The metrics go to the workspace. Raises UserError for a batch whose loss or gradient is not
    finite.
    """
    config = from_json(job.run / "config.json")
    bad_batch = job.run / BAD_BATCH
    try:
        with (
            preemption.defer_to_step(),
            profiling.worker_metrics(
                job.workspace, process.rank(), job.run / PROFILE if config.runtime.profile else None
            ),
        ):
            _train(job, config)
    except NonFiniteBatch as error:
        if process.rank() == 0:
            write_json(bad_batch, {"schema": 1, "iteration": job.iteration, **error.row})
        raise UserError(f"{error}\nAll of its triplets are in {bad_batch}.") from None
    if process.rank() == 0:
        bad_batch.unlink(missing_ok=True)  # of an attempt before


def _train(job: TrainJob, config: RunConfig) -> None:
    data = config.open_data(DataPaths(config.data_dir, job.cache, progress, config.train_dir)).train
    accelerate = create_accelerator(config.runtime.hang_timeout_minutes)
    if is_sharded(accelerate):
        problems = ValidationReport()
        config.model.check_sharded(problems)
        problems.raise_if_any()
    seed = seed_of(config.seed, "train", job.iteration)
    backbone: Any = config.model.build(job.parent)
    backbone.make_trainable(config.training, seed_of(config.seed, "lora"))
    batches = _batches(job, config.training, data, seed)
    features = VisionCache(backbone, data.images, job.cache / "vision", config.runtime)
    if is_sharded(accelerate):  # the tower must still be whole
        precompute_features(features, images_of_steps(batches, job.steps), accelerate.state)
    trainer = Trainer(
        backbone,
        features,
        batches,
        config.training,
        job.steps,
        seed,
        job.key,
        job.workspace,
        config.runtime.checkpoint_every_steps,
        accelerate,
        lambda row: events.emit("step", row=row),
        job.schedule,
    )
    main = accelerate.is_main_process
    if main and accelerate.num_processes > 1:
        logger.info(
            "training in %d processes, %s",
            accelerate.num_processes,
            accelerate.distributed_type.value,
        )
    rows = trainer.run(
        lambda steps: progress(steps, f"train iteration {job.iteration}") if main else steps
    )
    accelerate.wait_for_everyone()
    trainer.save_adapter(job.output)
    if main:
        drawn = batches.drawn(job.steps)
        log = {"schema": 1, "steps": job.steps, "drawn": drawn, "rows": rows}
        write_json(job.output / "training_log.json", log)
    accelerate.free_memory()


def _batches(
    job: TrainJob, settings: TrainingSettings, data: TrainSplit, seed: int
) -> BatchSampler:
    """Return the batches of human triplets, the newest texts and mined negatives."""
    samples = [Artifact(name, job.run / name, "") for name in job.augmented]
    newest = samples[-settings.augmented_rounds :] if settings.augmented_rounds else samples
    mined = (
        read_mined(Artifact(job.negatives, job.run / job.negatives, "")) if job.negatives else []
    )
    batches = BatchSampler(
        data.triplets,
        [row for sample in newest for row in read_augmented(sample)],
        mined,
        settings.batch_size,
        settings.augmented_fraction,
        settings.negatives_in_batch,
        seed,
        settings.unique_targets,
        batch_groups(data, settings.group_batches),
        known_positives(data, samples),
        settings.bundles,
    )
    if batches.num_known_positives and process.rank() == 0:
        logger.info(
            "%d of %d mined images are known to be right and no negatives",
            batches.num_known_positives,
            len(mined),
        )
    return batches


def _step_writer(path: Path) -> events.Listener:
    """Return a listener that writes each step to a file for the driver."""
    file = path.open("a", encoding="utf-8", buffering=1)

    def listen(kind: str, payload: dict[str, Any]) -> None:
        if kind == "step":
            file.write(json.dumps(payload["row"]) + "\n")

    return listen


def main() -> None:
    job = jobs.read(Path(sys.argv[1]))
    process.serve(
        job, lambda: run_worker(job) if isinstance(job, ShardJob) else _serve_training(job)
    )


def _serve_training(job: TrainJob) -> None:
    """Train; the first process passes the driver's request to stop on, and its steps back."""
    first = process.rank() == 0
    with ExitStack() as stack:
        stack.enter_context(preemption.handle_sigterm(job.stop_file if first else None))
        if first:
            stack.enter_context(events.subscribe(_step_writer(job.rows), "the driver's view"))
        try:
            train(job)
        except preemption.GracefulStop:
            # The driver knows from this file, also where it got no signal itself.
            job.stop_file.touch()


if __name__ == "__main__":
    main()
