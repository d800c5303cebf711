"""A worker of embedding and captioning: it does one shard of a job of `sharded_executor.py` and
writes files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import numpy as np
from accelerate import PartialState

from cirloop.artifacts.atomic import write_json
from cirloop.artifacts.store import fingerprint
from cirloop.backbones.features import VisionCache
from cirloop.captioning.batched_captioner import BatchedCaptioner
from cirloop.captioning.journal import Journal
from cirloop.config.run import RunConfig
from cirloop.data.paths import DataPaths
from cirloop.distributed.jobs import ShardJob
from cirloop.monitoring import profiling
from cirloop.monitoring.console import no_progress, progress
from cirloop.retrieval.embed import embed_shard
from cirloop.types import ImageId, Images, TrainSplit


def image_set_digest(images: Images, ids: Iterable[ImageId]) -> str:
    """Return a digest of images, by which a worker proves that it reads the driver's."""
    return fingerprint([[image, images.digest(image)] for image in dict.fromkeys(ids)])


def run_worker(job: ShardJob) -> None:
    """Do this process's shard of a job, with images that it loads itself."""
    import torch

    config = RunConfig(**job.config)
    gpu = {} if torch.cuda.is_available() else {"cpu": True, "backend": "gloo"}
    state = PartialState(timeout=timedelta(minutes=config.runtime.hang_timeout_minutes), **gpu)
    data = config.open_data(DataPaths(config.data_dir, job.cache, no_progress, config.train_dir))
    split = data.split_by_key(job.where)
    images = split.images
    image_ids = [item.image for item in job.items] + [
        image for request in job.requests for image in (request.reference, request.image)
    ]
    assert image_set_digest(images, image_ids) == job.images, "not the driver's images"
    with profiling.worker_metrics(
        job.directory, state.process_index, job.profile if config.runtime.profile else None
    ):
        if job.kind == "embed":
            _embed(job, config, images, state)
        else:
            assert isinstance(split, TrainSplit), "texts are written for images of training"
            _caption(job, config, split, state)


def _embed(job: ShardJob, config: RunConfig, images: Images, state: PartialState) -> None:
    """Write `i_rows.npy` and `i_vectors.npy`: every n-th batch of the items, from the i-th on."""
    share = (state.process_index, state.num_processes)
    runtime = config.runtime
    backbone = config.model.build(job.adapter)
    assert backbone.fingerprint == job.model, "this is another embedder than the driver's"
    features = VisionCache(backbone, images, job.cache / "vision", runtime)
    precompute_features(features, [item.image for item in job.items], state)
    shown = progress if share[0] == 0 else no_progress
    size = runtime.embed_batch_size
    rows, vectors = embed_shard(
        backbone, features, job.items, size, shown, job.title, runtime.max_tokens_per_batch, share
    )
    if rows:
        np.save(job.directory / f"{share[0]}_rows.npy", np.array(rows, np.int64))
        np.save(job.directory / f"{share[0]}_vectors.npy", vectors)


def _caption(job: ShardJob, config: RunConfig, train: TrainSplit, state: PartialState) -> None:
    """Write `i_answers.json`: the answers to every n-th batch of questions, from the i-th on."""
    share = (state.process_index, state.num_processes)
    assert job.answers is not None, "captions have a journal"
    captioner = BatchedCaptioner(
        config.foundation.build(None, train),
        train.images,
        job.cache / "vision",
        config.captioning.batch_size,
        progress if share[0] == 0 else no_progress,
        config.runtime,
        share,
        Journal(job.answers, share[0], config.runtime.answers_dir),
    )
    captioner.precompute_vision(
        job.requests, lambda features, image_ids: precompute_features(features, image_ids, state)
    )
    answer_requests: Any = getattr(captioner, job.kind)
    answers = answer_requests(job.prompt, job.requests, title=job.title, **job.options)
    if job.kind == "generate":
        answers = [[asdict(answer) for answer in row] for row in answers]
    rows = {
        "name": captioner.name,
        "rows": captioner.completed_indices,
        "answers": [answers[row] for row in captioner.completed_indices],
    }
    write_json(job.directory / f"{share[0]}_answers.json", rows)


def precompute_features(
    features: VisionCache, image_ids: Sequence[ImageId], state: PartialState
) -> None:
    """Compute the vision features of images, each process its shard of the batches that one process
    would do."""
    if not state.is_main_process:
        features.mark_counted_elsewhere(image_ids)  # the first process counts them
    batches = features.missing_batches(image_ids)
    state.wait_for_everyone()  # all have looked before the first writes
    features.compute(batches[state.process_index :: state.num_processes], progress=_vision(state))
    state.wait_for_everyone()
    features.missing_batches(image_ids)  # looks at what the others wrote


def _vision(state: PartialState) -> Any:
    return (lambda batches: progress(batches, "vision")) if state.is_main_process else iter
