"""Training: a job of the settings and artifacts, here or in launched processes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cirloop.artifacts import schema
from cirloop.artifacts.atomic import write_json
from cirloop.artifacts.store import Artifact, fingerprint
from cirloop.config.run import RunConfig
from cirloop.distributed import launcher
from cirloop.distributed.jobs import TrainJob
from cirloop.monitoring import profiling
from cirloop.stages.context import RunContext, adapter_path
from cirloop.training.health import loss_warning

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
    inputs = [] if untrained else [run.data.digest]
    inputs += [a.digest for a in (parent, *augmented, negatives) if a is not None]
    schedule = _schedule(config, iteration, steps)
    settings = _settings(run, iteration) | {"steps": steps, "schedule": schedule}

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
        _warn_of_loss(run, iteration, name, path)

    return run.build(name, settings, inputs, build, iteration)


def _warn_of_loss(run: RunContext, iteration: int, name: str, checkpoint: Path) -> None:
    rows = schema.read(checkpoint / "training_log.json")["rows"]
    warning = loss_warning([row["loss"] for row in rows if "ids" not in row], iteration)
    if warning:
        run.costs.warn(f"{name}: {warning}")


def _schedule(config: RunConfig, iteration: int, steps: int) -> tuple[int, int]:
    """Return the first of these steps in the learning rate's, and that one's length."""
    if iteration and config.training.lr_span == "run":
        return (iteration - 1) * steps, config.num_iterations * steps
    return 0, steps


def _settings(run: RunContext, iteration: int) -> dict[str, Any]:
    """Return the settings that the training of an iteration depends on."""
    settings = run.stage_config("model", "training", "data")
    if iteration == 0:  # so that runs which differ in later iterations only may share it
        for name in LATER_ITERATIONS_ONLY:
            settings["training"].pop(name, None)
    return settings
