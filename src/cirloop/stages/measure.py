"""Seconds of a run's work, measured before it begins: an image in the tower, a batch embedded,
texts written and judged, a step of training. As much of each as is predicted to take `BUDGET_S`
seconds, at most the settings' own batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch

from cirloop.backbones.features import VisionCache
from cirloop.captioning.base import CaptionRequest
from cirloop.captioning.batched_captioner import BatchedCaptioner
from cirloop.config.run import RunConfig
from cirloop.data import Dataset
from cirloop.distributed.worker import create_accelerator
from cirloop.retrieval.embed import embed, query_items
from cirloop.stages.models import Models
from cirloop.training.batches import BatchSampler
from cirloop.training.config import InfoNCE
from cirloop.training.trainer import Trainer
from cirloop.types import EvalSplit, TrainSplit

T = TypeVar("T")
BUDGET_S = 12.0
"""Seconds for each of the measurements, besides loading and a first try with a few rows."""
FIRST_ROWS = 2
"""Rows of the first try."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one piece of work, measured with `rows` of the `of` rows of a full batch."""

    seconds: float
    rows: int
    of: int

    def __str__(self) -> str:
        part = (
            f"a full batch of {self.of}"
            if self.rows == self.of
            else f"{self.rows} rows of a batch of {self.of}"
        )
        return f"{1000 * self.seconds:,.1f} ms, from {part}"


def time_rows(work: Callable[[int], object], of: int) -> Timing:
    """Measure the seconds per row of `work(rows)`.

    A few rows are timed first, then as many of `of` as fit the budget, if they are more.
    """
    rows = min(FIRST_ROWS, of)
    work(rows)  # the first call also warms up
    while True:
        _synchronize()
        began = time.perf_counter()
        work(rows)
        _synchronize()
        seconds = (time.perf_counter() - began) / rows
        more = min(of, int(BUDGET_S / max(seconds, 1e-9)))
        if more < 2 * rows and (more <= rows or more < of):
            return Timing(seconds, rows, of)
        # Larger batches are faster: the prediction is made anew on the way.
        rows = min(more, 8 * rows)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _quiet(items: Iterable[T], title: str = "") -> Iterable[T]:
    return items


def measure(config: RunConfig, data: Dataset, most_rows: int) -> dict[str, Timing]:
    """Measure the seconds of an image encoded, a row embedded, an image's texts and a training
    triplet.

    Keys are `image`, `row`, `text` and `step`; the last two only where the run `trains`, the last
    only where its activations are those of at most `most_rows` rows. Releases every model at the
    end.
    """
    models = Models(config)
    try:
        split = data.train if config.trains else data.eval_splits(config.evaluation.split)[0]
        timings = _embedding(config, models, split)
        foundation = config.foundation
        writes = config.num_iterations and config.captioning.enabled
        if writes and foundation.is_timed:
            timings["text"] = _captioning(config, models, data.train)
        size = min(config.training.batch_size, len(data.train.triplets)) if config.trains else 0
        if not config.training.grad_cache_chunk_size:
            size = min(size, most_rows // 2)
        if size >= FIRST_ROWS and 2 * config.training.grad_cache_chunk_size <= most_rows:
            timings["step"] = _training(config, models, data.train, size)
        return timings
    finally:
        models.release()


def _embedding(
    config: RunConfig, models: Models, split: TrainSplit | EvalSplit
) -> dict[str, Timing]:
    embedder = models.embedder(None)
    runtime = config.runtime
    queries = split.queries if isinstance(split, EvalSplit) else [t.query for t in split.triplets]
    items = _repeat_to(query_items(queries), runtime.embed_batch_size)
    images = [
        split.images.load(item.image) for item in _repeat_to(items, runtime.vision_batch_size)
    ]

    def encode(rows: int) -> object:
        return models.load(embedder).encode_images(images[:rows])

    encoding = time_rows(encode, runtime.vision_batch_size)
    # Whose images must be encoded first.
    size = min(len(items), max(FIRST_ROWS, int(BUDGET_S / encoding.seconds)))
    features = models.vision_cache(embedder, split)
    features.precompute([item.image for item in items[:size]])

    def work(rows: int) -> object:
        return embed(models.load(embedder), features, items[:rows], rows, _quiet, "measure")

    row = time_rows(work, size)
    return {"image": encoding, "row": Timing(row.seconds, row.rows, len(items))}


def _captioning(config: RunConfig, models: Models, train: TrainSplit) -> Timing:
    settings = config.captioning
    prompts = config.captioning.prompts(config.foundation)
    requests = _repeat_to(
        [CaptionRequest(t.query.reference, t.target, t.query.text) for t in train.triplets],
        settings.batch_size,
    )
    captioner = models.captioner(models.embedder(None), train)
    batched_captioner = BatchedCaptioner(
        captioner, train.images, config.cache / "vision", len(requests), _quiet, config.runtime
    )
    temperatures = [0.0] + [settings.temperature] * (settings.num_candidates - 1)

    def work(rows: int) -> object:
        texts = batched_captioner.generate(
            prompts.rewrite, requests[:rows], settings.max_new_tokens, temperatures, 0, "measure"
        )
        if not settings.min_verify_probability:
            return texts
        verify_requests = [ask for ask in requests[:rows] for _ in range(settings.num_candidates)]
        return batched_captioner.yes_probability(
            prompts.verify, verify_requests[: len(requests)], "measure"
        )

    return time_rows(work, len(requests))


def _training(config: RunConfig, models: Models, train: TrainSplit, size: int) -> Timing:
    """Measure the seconds of a triplet in a step of at most `size`.

    The loss is InfoNCE, which needs no mined images; the time of the loss itself is negligible.
    """
    backbone = models.load(models.embedder(None))
    backbone.make_trainable(config.training, 0)
    accelerate = create_accelerator()
    features = VisionCache(backbone, train.images, config.cache / "vision", config.runtime)

    def work(rows: int) -> object:
        settings = config.training.model_copy(
            update={"batch_size": rows, "num_hard_candidates": 0, "loss": InfoNCE()}
        )
        batches = BatchSampler(train.triplets, [], [], rows, 0.0, 0, 0, False)
        with TemporaryDirectory() as work:
            trainer = Trainer(
                backbone, features, batches, settings, 1, 0, "measure", Path(work), 0, accelerate
            )
            trainer.module.train()
            loss = trainer.engine.backward(0)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
            return loss

    timing = time_rows(work, size)
    accelerate.free_memory()
    return Timing(timing.seconds, timing.rows, config.training.batch_size)


def _repeat_to(rows: Sequence[Any], num: int) -> list[Any]:
    """Return the first `num` rows, repeated where there are fewer."""
    return [rows[i % len(rows)] for i in range(num)]
