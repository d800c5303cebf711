"""A job inside a process: training, also in the driver's, or a share of embedding and captioning.

`python -m cirloop.worker JOB`, under a launcher. To train, rows come from the run directory's artifacts, and rank 0
writes the checkpoint.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from threading import Thread
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, InitProcessGroupKwargs

from cirloop import cost, relay, silence, stopping, telling
from cirloop.artifacts import Artifact, write_json, write_text
from cirloop.backbones.features import VisionFeatures
from cirloop.config import from_json
from cirloop.data.sources import Sources
from cirloop.disk import explain
from cirloop.report.costs import PROFILE
from cirloop.report.terminal import progress, start_logging
from cirloop.rows import known_positives, read_augmented, read_mined
from cirloop.share import do_share, see_together
from cirloop.training.batches import Batches
from cirloop.training.gradients import seed_of
from cirloop.training.health import BadBatch
from cirloop.training.trainer import Trainer
from cirloop.types import ImageId, QueryId, TrainSplit, UserError

logger = logging.getLogger("cirloop.worker")  # also when run as __main__
BAD_BATCH = "bad_batch.json"


def _artifact(job: dict[str, Any], name: str) -> Artifact:
    return Artifact(name, Path(job["run"]) / name, "")


def accelerator() -> Accelerator:
    """Accelerate as the launcher set it up; gloo where there is no GPU."""
    import torch

    # Models are loaded whole and then cut, also under ZeRO-3: an adapter is put on and proven before.
    os.environ["ACCELERATE_DEEPSPEED_ZERO3_INIT"] = "false"
    fsdp = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if fsdp and os.environ.get("FSDP_VERSION") != "2":
        raise UserError(
            f"fsdp_version {os.environ.get('FSDP_VERSION')} in the accelerate config; set it to 2, as in "
            "configs/accelerate/fsdp2.yaml."
        )
    if torch.cuda.is_available():
        return Accelerator()
    handlers = [InitProcessGroupKwargs(backend="gloo")] if "RANK" in os.environ else []
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"  # Accelerate drops DeepSpeed if told cpu=True
    made = Accelerator(cpu=not deepspeed, kwargs_handlers=handlers)
    if fsdp and made.num_processes > 1:  # Accelerate itself would take plain DDP here, though torch's FSDP2 has gloo
        made.state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        made.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    return made


def in_pieces(accelerate: Accelerator) -> bool:
    """Whether weights lie in pieces on the processes: then a forward pass is for all of them together."""
    plugin = accelerate.state.deepspeed_plugin
    return accelerate.distributed_type == DistributedType.FSDP or (plugin is not None and plugin.zero_stage == 3)


def images_of(batches: Batches, steps: int) -> list[ImageId]:
    """All that the steps look at."""
    wanted = [batches[step] for step in range(steps)]
    return sorted({image for b in wanted for image in (*b.candidates, *(q.reference for q in b.queries))})


def groups_of(data: TrainSplit, kind: str) -> dict[QueryId, str] | None:
    """The group of each human query that batches keep together."""
    queries = [(t.query, t.target) for t in data.triplets]
    if kind == "category":
        return {query.id: data.categories[target] for query, target in queries}
    if kind == "group":
        return {query.id: " ".join(sorted({query.reference, *data.groups[query.id]})) for query, _ in queries}
    return None


def train(job: dict[str, Any]) -> None:
    """Train one stage and write `job["output"]`: adapter, adapter config and training log. What it cost goes to the
    workspace."""
    profile = Path(job["run"]) / PROFILE if job["runtime"]["profile"] else None
    bad = Path(job["run"]) / BAD_BATCH
    try:
        with stopping.by_step(), cost.process(Path(job["workspace"]), rank(), profile):
            _train(job)
    except BadBatch as error:
        if rank() == 0:
            write_json(bad, {"schema": 1, "iteration": job["iteration"], **error.row})
        raise UserError(f"{error}\nAll of its triplets are in {bad}.") from None
    if rank() == 0:
        bad.unlink(missing_ok=True)  # of an attempt before


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _train(job: dict[str, Any]) -> None:
    config = from_json(Path(job["run"]) / "config.json")
    data = config.data.build(Sources(config.data_dir, Path(job["cache"]), progress, config.train_dir)).train
    settings, iteration = config.training, int(job["iteration"])
    accelerate = accelerator()
    if getattr(config.model, "compile", False) and in_pieces(accelerate):
        raise UserError(
            "model.compile is not available where weights lie in pieces (DeepSpeed ZeRO-3, FSDP2). Set model.compile "
            "false, or keep the weights whole (ZeRO-2, DDP)."
        )
    seed = seed_of(config.seed, "train", iteration)
    backbone: Any = config.model.build(Path(job["parent"]) if job["parent"] else None)
    backbone.make_trainable(settings, seed_of(config.seed, "lora"))
    samples = [_artifact(job, name) for name in job["augmented"]]
    augmented = [row for each in samples for row in read_augmented(each)]
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
        known_positives(data, samples),
    )
    features = VisionFeatures(backbone, data.images, Path(job["cache"]) / "vision", config.runtime)
    if in_pieces(accelerate):  # the tower must still be whole
        see_together(features, images_of(batches, job["steps"]), accelerate.state)
    trainer = Trainer(
        backbone, features, batches, settings, job["steps"], seed, job["key"], Path(job["workspace"]),
        config.runtime.save_every, accelerate, lambda row: telling.tell("step", row=row),
    )  # fmt: skip
    main = accelerate.is_main_process
    if main and batches.num_right:
        logger.info("%d of %d mined images are known to be right and no negatives", batches.num_right, len(mined))
    if main and accelerate.num_processes > 1:
        logger.info("training in %d processes, %s", accelerate.num_processes, accelerate.distributed_type.value)
    rows = trainer.run(lambda steps: progress(steps, f"train iteration {iteration}") if main else steps)
    accelerate.wait_for_everyone()
    output = Path(job["output"])
    trainer.save_adapter(output)
    if main:
        write_json(output / "training_log.json", {"schema": 1, "steps": job["steps"], "rows": rows})
    accelerate.free_memory()


def end_with(driver: tuple[str, int]) -> None:
    """End this process when the driver on the same machine has ended: nobody waits for its result any more."""
    host, pid = driver

    def watch() -> None:
        while Path(f"/proc/{pid}").exists():
            time.sleep(1)
        os._exit(1)

    if host == socket.gethostname() and Path("/proc/self").exists():
        Thread(target=watch, daemon=True).start()


def main() -> None:
    start_logging()
    job = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    end_with(job["driver"])
    silence.break_it(Path(sys.argv[1]).parent)
    try:
        with relay.sending() if rank() == 0 else nullcontext():
            if "kind" in job:
                do_share(job)
            else:
                with stopping.listening(Path(job["order"]) if rank() == 0 else None):
                    train(job)
    except stopping.Stopped:  # the driver knows from this file, also where it got no signal itself
        Path(job["order"]).touch()
    except UserError as error:
        write_text(Path(job["error"]), str(error))
        sys.exit(2)
    except OSError as error:
        told = explain(error)
        if told is None:
            raise
        logger.error(told)  # the driver's own message may find no room
        with suppress(OSError):
            write_text(Path(job["error"]), told)
        sys.exit(2)
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
