"""Training: a job of the settings and artifacts, here or in launched processes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cirloop.artifacts import schema
from cirloop.artifacts.atomic import write_json
from cirloop.artifacts.store import Artifact, fingerprint
from cirloop.distributed import launcher
from cirloop.distributed.jobs import TrainJob
from cirloop.monitoring import profiling
from cirloop.stages.context import RunContext, adapter_path
from cirloop.training.health import plateau_warning

LATER_ITERATIONS_ONLY = {
    "augmented_fraction",
    "augmented_rounds",
    "bundles",
    "iteration_0_steps",
    "lr_span",
    "negatives",
    "negatives_in_batch",
    "start_from",
    "steps_per_iteration",
}
"""Settings of training that iteration 0 does not read; its number of steps is given apart."""


def train(
    run: RunContext,
    iteration: int,
    parent: Artifact | None,
    augmented: Sequence[Artifact],
    negatives: Artifact | None,
) -> Artifact:
    """Write checkpoint_iter_{t}/: the LoRA trained on human and augmented triplets with mined
    negatives."""
    config = run.config
    name = f"checkpoint_iter_{iteration}"
    steps = config.training.steps_per_iteration if iteration else config.training.iteration_0_steps
    untrained = steps == 0 and parent is None  # evaluating a base model needs no training data
    if iteration and config.training.start_from == "iteration_0":
        parent = run.store.load("checkpoint_iter_0")
    inputs = [a.digest for a in (parent, *augmented, negatives) if a is not None]
    inputs = inputs if untrained else [run.data.digest, *inputs]
    schedule = (0, steps)
    if iteration and config.training.lr_span == "run":
        schedule = ((iteration - 1) * steps, config.num_iterations * steps)
    settings = run.stage_config("model", "training", "data") | {"steps": steps}
    settings["schedule"] = schedule
    if iteration == 0:  # so that runs which differ in later iterations only may share it
        settings["training"] = {
            name: value
            for name, value in settings["training"].items()
            if name not in LATER_ITERATIONS_ONLY
        }

    def build(path: Path) -> None:
        if untrained or config.retrieval == "simulated":  # which has nothing to train
            write_json(path / "training_log.json", run.mark | {"schema": 1, "steps": 0, "rows": []})
            return
        workspace = run.store.scratch_dir(name)
        job = TrainJob(
            directory=workspace.parent,
            log=run.log,
            run=run.store.directory,
            cache=config.cache,
            iteration=iteration,
            steps=steps,
            parent=adapter_path(parent),
            augmented=tuple(a.name for a in augmented),
            negatives=negatives.name if negatives else None,
            schedule=schedule,
            key=fingerprint([settings, inputs]),
            workspace=workspace,
            output=path,
        )
        run.models.release()  # the trainer loads its own
        with profiling.collect_workers(workspace):
            launcher.run_training(job, config.runtime)
        log = schema.read(path / "training_log.json")
        plateau = plateau_warning([row["loss"] for row in log["rows"] if "ids" not in row])
        if plateau:
            run.costs.warn(f"{name}: {plateau}")

    return run.build(name, settings, inputs, build, iteration)
