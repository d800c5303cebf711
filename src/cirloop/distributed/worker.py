"""A job inside a process: training, also in the driver's, or a share of embedding and captioning.

`python -m cirloop.distributed.worker JOB`, under a launcher. To train, rows come from the run
directory's artifacts, and rank 0 writes the checkpoint.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import time
from contextlib import ExitStack, suppress
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, InitProcessGroupKwargs

from cirloop.artifacts.fs import explain
from cirloop.artifacts.rows import read_augmented, read_mined
from cirloop.artifacts.store import Artifact, write_json, write_text
from cirloop.backbones.features import VisionFeatures
from cirloop.config.run import RunConfig, from_json
from cirloop.data.known_positives import known_positives
from cirloop.data.paths import DataPaths
from cirloop.distributed import jobs
from cirloop.distributed.jobs import Job, ShardJob, TrainJob
from cirloop.distributed.sharded_worker import do_share, see_together
from cirloop.monitoring import events, live, preemption, profiling
from cirloop.monitoring.console import Safe, progress, start_logging
from cirloop.monitoring.costs import PROFILE
from cirloop.training.batches import Batches
from cirloop.training.gradient_engine import seed_of
from cirloop.training.health import BadBatch
from cirloop.training.trainer import Trainer
from cirloop.types import ImageId, QueryId, TrainSplit, UserError

logger = logging.getLogger("cirloop.distributed.worker")  # also when run as __main__
BAD_BATCH = "bad_batch.json"


def accelerator(hang_timeout_minutes: float = 30) -> Accelerator:
    """Accelerate as the launcher set it up; gloo where there is no GPU. Processes wait for each
    other for so long."""
    import torch

    # Models are loaded whole and then cut, also under ZeRO-3: an adapter is put on and proven
    # before.
    os.environ["ACCELERATE_DEEPSPEED_ZERO3_INIT"] = "false"
    fsdp = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if fsdp and os.environ.get("FSDP_VERSION") != "2":
        raise UserError(
            f"fsdp_version {os.environ.get('FSDP_VERSION')} in the accelerate config; set it to 2,"
            " as in configs/accelerate/fsdp2.yaml."
        )
    timeout = timedelta(minutes=hang_timeout_minutes)
    if torch.cuda.is_available():
        return Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)])
    handlers = (
        [InitProcessGroupKwargs(backend="gloo", timeout=timeout)] if "RANK" in os.environ else []
    )
    deepspeed = (
        os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    )  # Accelerate drops DeepSpeed if told cpu=True
    made = Accelerator(cpu=not deepspeed, kwargs_handlers=handlers)
    if (
        fsdp and made.num_processes > 1
    ):  # Accelerate itself would take plain DDP here, though torch's FSDP2 has gloo
        made.state.distributed_type = PartialState._shared_state["distributed_type"] = (
            DistributedType.FSDP
        )
        made.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    return made


def in_pieces(accelerate: Accelerator) -> bool:
    """Whether weights lie in pieces on the processes: then a forward pass is for all of them
    together."""
    plugin = accelerate.state.deepspeed_plugin
    return accelerate.distributed_type == DistributedType.FSDP or (
        plugin is not None and plugin.zero_stage == 3
    )


def images_of(batches: Batches, steps: int) -> list[ImageId]:
    """All that the steps look at."""
    wanted = [batches[step] for step in range(steps)]
    return sorted(
        {image for b in wanted for image in (*b.candidates, *(q.reference for q in b.queries))}
    )


def groups_of(data: TrainSplit, kind: str) -> dict[QueryId, str] | None:
    """The group of each human query that batches keep together."""
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
    """Train one stage and write `job.output`: adapter, adapter config and training log. What it
    cost goes to the workspace."""
    config = from_json(job.run / "config.json")
    bad = job.run / BAD_BATCH
    try:
        with (
            preemption.by_step(),
            profiling.process(
                job.workspace, rank(), job.run / PROFILE if config.runtime.profile else None
            ),
        ):
            _train(job, config)
    except BadBatch as error:
        if rank() == 0:
            write_json(bad, {"schema": 1, "iteration": job.iteration, **error.row})
        raise UserError(f"{error}\nAll of its triplets are in {bad}.") from None
    if rank() == 0:
        bad.unlink(missing_ok=True)  # of an attempt before


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _train(job: TrainJob, config: RunConfig) -> None:
    data = config.data.build(
        DataPaths(config.data_dir, job.cache, progress, config.train_dir)
    ).train
    settings, iteration = config.training, job.iteration
    accelerate = accelerator(config.runtime.hang_timeout_minutes)
    if getattr(config.model, "compile", False) and in_pieces(accelerate):
        raise UserError(
            "model.compile is not available where weights lie in pieces (DeepSpeed ZeRO-3, FSDP2)."
            " Set model.compile false, or keep the weights whole (ZeRO-2, DDP)."
        )
    seed = seed_of(config.seed, "train", iteration)
    backbone: Any = config.model.build(job.parent)
    backbone.make_trainable(settings, seed_of(config.seed, "lora"))
    samples = [Artifact(name, job.run / name, "") for name in job.augmented]
    augmented = [row for each in samples for row in read_augmented(each)]
    mined = (
        read_mined(Artifact(job.negatives, job.run / job.negatives, "")) if job.negatives else []
    )
    batches = Batches(
        data.triplets,
        augmented,
        mined,
        settings.batch_size,
        settings.augmented_fraction,
        settings.negatives_in_batch,
        seed,
        settings.unique_targets,
        groups_of(data, settings.group_batches),
        known_positives(data, samples),
    )
    features = VisionFeatures(backbone, data.images, job.cache / "vision", config.runtime)
    if in_pieces(accelerate):  # the tower must still be whole
        see_together(features, images_of(batches, job.steps), accelerate.state)
    trainer = Trainer(
        backbone,
        features,
        batches,
        settings,
        job.steps,
        seed,
        job.key,
        job.workspace,
        config.runtime.checkpoint_every_steps,
        accelerate,
        lambda row: events.tell("step", row=row),
    )
    main = accelerate.is_main_process
    if main and batches.num_right:
        logger.info(
            "%d of %d mined images are known to be right and no negatives",
            batches.num_right,
            len(mined),
        )
    if main and accelerate.num_processes > 1:
        logger.info(
            "training in %d processes, %s",
            accelerate.num_processes,
            accelerate.distributed_type.value,
        )
    rows = trainer.run(
        lambda steps: progress(steps, f"train iteration {iteration}") if main else steps
    )
    accelerate.wait_for_everyone()
    trainer.save_adapter(job.output)
    if main:
        write_json(
            job.output / "training_log.json", {"schema": 1, "steps": job.steps, "rows": rows}
        )
    accelerate.free_memory()


def end_with(driver: tuple[str, int]) -> None:
    """End this process when the driver on the same machine has ended: nobody waits for its result
    any more."""
    host, pid = driver

    def watch() -> None:
        while Path(f"/proc/{pid}").exists():
            time.sleep(1)
        os._exit(1)

    if host == socket.gethostname() and Path("/proc/self").exists():
        Thread(target=watch, daemon=True).start()


def _log_beside(attempt: Path) -> None:
    """A log of this process: what it says of the first one, which has the terminal too; of the
    others all output."""
    path = attempt.with_suffix(f".rank_{rank()}.log")
    if rank() == 0:
        handler = logging.FileHandler(path, encoding="utf-8")
        handler.setFormatter(Safe("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.getLogger().addHandler(handler)
        return
    with path.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)


def _rows_to(path: Path) -> events.Listener:
    """Has the driver tell of each step."""
    file = path.open("a", encoding="utf-8", buffering=1)

    def listen(kind: str, what: dict[str, Any]) -> None:
        if kind == "step":
            file.write(json.dumps(what["row"]) + "\n")

    return listen


def main() -> None:
    job = jobs.read(Path(sys.argv[1]))
    first = rank() == 0
    start_logging(plain=not first)
    end_with(job.driver)
    try:
        if job.log is not None:
            _log_beside(job.log)
        with ExitStack() as stack:
            if first:
                stack.enter_context(live.shown())
            if isinstance(job, ShardJob):
                do_share(job)
            else:
                stack.enter_context(preemption.listening(job.stop if first else None))
                if first:
                    stack.enter_context(events.heard_by(_rows_to(job.rows), "the driver's view"))
                train(job)
    except (
        preemption.Stopped
    ):  # the driver knows from this file, also where it got no signal itself
        assert isinstance(job, TrainJob)
        job.stop.touch()
    except UserError as error:
        _fail(job, str(error))
    except OSError as error:
        said = explain(error)
        if said is None:
            raise
        logger.error(said)  # the driver's own message may find no room
        _fail(job, said)
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _fail(job: Job, message: str) -> None:
    with suppress(OSError):
        write_text(job.error, message)
    sys.exit(2)


if __name__ == "__main__":
    main()
