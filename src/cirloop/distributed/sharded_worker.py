"""Embedding and captioning in one of N processes: its share of a job of `sharded_executor.py`,
written to files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import numpy as np
from accelerate import PartialState

from cirloop.artifacts.store import fingerprint, write_json
from cirloop.backbones.features import VisionFeatures
from cirloop.captioning.batched_captioner import Eyes
from cirloop.config.run import RunConfig
from cirloop.data.paths import DataPaths
from cirloop.distributed.jobs import ShardJob
from cirloop.monitoring import profiling
from cirloop.monitoring.console import progress
from cirloop.retrieval.embed import embed_shard
from cirloop.types import ImageId, Images


def content(images: Images, ids: Iterable[ImageId]) -> str:
    """Of pictures: a process proves that it looks at the driver's."""
    return fingerprint([[image, images.digest(image)] for image in dict.fromkeys(ids)])


def do_share(job: ShardJob) -> None:
    """This process's share of a job, whose images it finds by itself."""
    import torch

    config = RunConfig(**job.config)
    gpu = {} if torch.cuda.is_available() else {"cpu": True, "backend": "gloo"}
    state = PartialState(timeout=timedelta(minutes=config.runtime.hang_timeout_minutes), **gpu)
    data = config.data.build(DataPaths(config.data_dir, job.cache, _quiet, config.train_dir))
    images = data.split_by_key(job.where).images
    wanted = [item.image for item in job.items] + [
        image for ask in job.asks for image in (ask.first, ask.second)
    ]
    assert content(images, wanted) == job.images, "not the driver's pictures"
    with profiling.process(
        job.directory, state.process_index, job.profile if config.runtime.profile else None
    ):
        (_embed if job.kind == "embed" else _caption)(job, config, images, state)


def _embed(job: ShardJob, config: RunConfig, images: Images, state: PartialState) -> None:
    """Write `i_rows.npy` and `i_vectors.npy`: every n-th batch of the items, from the i-th on."""
    share, runtime = (state.process_index, state.num_processes), config.runtime
    backbone = config.model.build(job.adapter)
    assert backbone.fingerprint == job.model, "this is another embedder than the driver's"
    features = VisionFeatures(backbone, images, job.cache / "vision", runtime)
    see_together(features, [item.image for item in job.items], state)
    shown, size = progress if share[0] == 0 else _quiet, runtime.embed_batch_size
    rows, vectors = embed_shard(
        backbone, features, job.items, size, shown, job.title, runtime.max_tokens_per_batch, share
    )
    if rows:
        np.save(job.directory / f"{share[0]}_rows.npy", np.array(rows, np.int64))
        np.save(job.directory / f"{share[0]}_vectors.npy", vectors)


def _caption(job: ShardJob, config: RunConfig, images: Images, state: PartialState) -> None:
    """Write `i_answers.json`: the answers to every n-th batch of questions, from the i-th on."""
    share = (state.process_index, state.num_processes)
    captioner, size = config.foundation.build(), config.captioning.batch_size
    shown = progress if share[0] == 0 else _quiet
    eyes = Eyes(captioner, images, job.cache / "vision", size, shown, config.runtime, share)
    eyes.see(job.asks, lambda features, wanted: see_together(features, wanted, state))
    ask: Any = {"write": eyes.write, "yes": eyes.yes}[job.kind]
    answers = ask(job.prompt, job.asks, title=job.title, **job.options)
    if job.kind == "write":
        answers = [[asdict(answer) for answer in row] for row in answers]
    rows = {
        "name": captioner.name,
        "rows": eyes.done,
        "answers": [answers[row] for row in eyes.done],
    }
    write_json(job.directory / f"{share[0]}_answers.json", rows)


def see_together(features: VisionFeatures, wanted: Sequence[ImageId], state: PartialState) -> None:
    """Have the images on disk, each process its share of the batches that one process would
    make."""
    if not state.is_main_process:
        features.known(wanted)  # the first process counts them
    batches = features.missing(wanted)
    state.wait_for_everyone()  # all have looked before the first writes
    features.make(batches[state.process_index :: state.num_processes], progress=_vision(state))
    state.wait_for_everyone()
    features.missing(wanted)  # looks at what the others wrote


def _vision(state: PartialState) -> Any:
    return (lambda batches: progress(batches, "vision")) if state.is_main_process else iter


def _quiet(items: Any, title: str) -> Any:
    return items
