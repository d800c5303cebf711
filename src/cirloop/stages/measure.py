"""What each piece of a run's work costs, measured before it begins: with as much of each as is
predicted to take `timing.BUDGET_S` seconds, at most the settings' own batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
import torch

from cirloop.backbones.features import VisionCache
from cirloop.backbones.model_settings import VlmSettings
from cirloop.captioning.base import Answer, CaptionRequest
from cirloop.captioning.batched_captioner import BatchedCaptioner
from cirloop.captioning.config import CaptioningSettings
from cirloop.captioning.prompts import Prompt
from cirloop.config.run import RunConfig
from cirloop.data import Dataset
from cirloop.distributed.worker import create_accelerator
from cirloop.monitoring import profiling
from cirloop.retrieval.embed import batches_of, embed, query_items
from cirloop.retrieval.topk import topk
from cirloop.stages import timing
from cirloop.stages.models import Models
from cirloop.stages.timing import FIRST_ROWS, Point, Timing, fit, seconds_of, time_rows
from cirloop.stages.work import Cost, Piece
from cirloop.training.batches import BatchSampler
from cirloop.training.config import InfoNCE
from cirloop.training.trainer import Trainer
from cirloop.types import EvalSplit, TrainSplit

T = TypeVar("T")
VISION_BATCHES = 8
"""Batches of images that are encoded at most."""
ANSWERS = 4
"""Texts written for each question, so that reading it weighs little beside writing."""
QUICK_LOADING_S = 10.0
"""Seconds of loading a model up to which it is loaded twice: the first time also imports."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Timings by piece; tokens of a text that was written, 0 = none was; and the share of an
    image's texts that differ."""

    timings: dict[Piece, Timing]
    answer: float = 0.0
    distinct: float = 1.0

    @property
    def costs(self) -> dict[Piece, Cost]:
        return {piece: timing.cost for piece, timing in self.timings.items()}


def _quiet(items: Iterable[T], title: str = "") -> Iterable[T]:
    return items


def measure(config: RunConfig, data: Dataset, most_rows: int) -> Measured:
    """Measure the pieces of a run's work.

    Those of captions and training only where the run has them, and `step` only where its
    activations are those of at most `most_rows` rows. Releases every model at the end.
    """
    models = Models(config)
    try:
        split = data.train if config.trains else data.eval_splits(config.evaluation.split)[0]
        timings: dict[Piece, Timing] = {"load": _loading(models)}
        timings |= _embedding(config, models, split)
        answer = 0.0
        distinct = 1.0
        writes = config.num_iterations and config.captioning.enabled
        if writes and config.foundation.is_timed:
            captions, answer, distinct = _captioning(config, models, data.train)
            timings |= captions
        size = min(config.training.batch_size, len(data.train.triplets)) if config.trains else 0
        if not config.training.grad_cache_chunk_size:
            size = min(size, most_rows // 2)
        if size >= FIRST_ROWS and 2 * config.training.grad_cache_chunk_size <= most_rows:
            encoded = int(timing.BUDGET_S / timings["image"].cost.unit)
            size = min(size, max(FIRST_ROWS, encoded // 2))
            timings["step"] = _training(config, models, data.train, size)
        return Measured(timings, answer, distinct)
    finally:
        models.release()


def _loading(models: Models) -> Timing:
    embedder = models.embedder(None)
    took = seconds_of(lambda: models.load(embedder))
    if took < QUICK_LOADING_S:
        models.release()
        took = seconds_of(lambda: models.load(embedder))
    return Timing(Cost(0.0, took), 1, 1)


def _embedding(
    config: RunConfig, models: Models, split: TrainSplit | EvalSplit
) -> dict[Piece, Timing]:
    embedder = models.embedder(None)
    runtime = config.runtime
    queries = split.queries if isinstance(split, EvalSplit) else [t.query for t in split.triplets]
    num_images = min(len(split.gallery.ids), VISION_BATCHES * runtime.vision_batch_size)

    def encode(rows: int) -> None:
        with TemporaryDirectory() as directory:
            cache = VisionCache(models.load(embedder), split.images, Path(directory), runtime)
            cache.precompute(split.gallery.ids[:rows])

    *_, (rows, took) = time_rows(encode, num_images)
    image = Timing(Cost(0.0, took / rows), rows, num_images)
    items = query_items(queries)[: runtime.embed_batch_size]
    # Whose images must be encoded first.
    items = items[: max(FIRST_ROWS, int(timing.BUDGET_S / image.cost.unit))]
    features = models.vision_cache(embedder, split)
    features.precompute([item.image for item in items])
    backbone = models.load(embedder)
    grids = features.grids([item.image for item in items])
    is_vlm = isinstance(config.model, VlmSettings)
    lengths = [
        backbone.sequence_length(item, grid) if is_vlm else 1
        for item, grid in zip(items, grids, strict=True)
    ]

    def point(batch_size: int) -> Point:
        calls = len(batches_of(lengths, batch_size))
        took = seconds_of(lambda: embed(backbone, features, items, batch_size, _quiet, "measure"))
        return Point(calls, sum(lengths), took)

    point(FIRST_ROWS)  # warms up
    cost = fit(point(FIRST_ROWS), point(runtime.embed_batch_size))
    vectors = embed(backbone, features, items[:1], 1, _quiet, "measure")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "image": image,
        "row": Timing(cost, len(items), runtime.embed_batch_size),
        "search": _search(device, vectors.shape[-1]),
        "rank": _search("cpu", vectors.shape[-1]),
    }


def _search(device: str, width: int) -> Timing:
    """Measure a score of the best images of random vectors."""
    random = np.random.default_rng(0)
    num_queries, num_images = (2048, 1 << 16) if device == "cuda" else (256, 1 << 13)
    queries = random.standard_normal((num_queries, width), np.float32)
    gallery = random.standard_normal((num_images, width), np.float32)
    topk(queries[:2], gallery, 10, device)  # warms up
    took = seconds_of(lambda: topk(queries, gallery, 10, device))
    return Timing(Cost(0.0, took / (num_queries * num_images)), num_queries, num_queries)


def _captioning(
    config: RunConfig, models: Models, train: TrainSplit
) -> tuple[dict[Piece, Timing], float, float]:
    """Measure a question's token read, and a text's token written; return them, the tokens of a
    text, and the share of an image's texts that differ."""
    settings = config.captioning
    prompts = settings.prompts(config.foundation)
    requests = _repeat_to(
        [CaptionRequest(t.query.reference, t.target, t.query.text) for t in train.triplets],
        settings.batch_size,
    )
    captioner = models.captioner(models.embedder(None), train)
    batched_captioner = BatchedCaptioner(
        captioner, train.images, config.cache / "vision", len(requests), _quiet, config.runtime
    )
    batched_captioner.precompute_vision(requests, lambda cache, images: cache.precompute(images))
    reading, num_read = _reading(batched_captioner, prompts.verify, requests)
    points, texts = _writing(batched_captioner, prompts.rewrite, requests, settings, reading)
    num = min(ANSWERS, settings.num_candidates)
    distinct = sum(len({answer.text for answer in row[:num]}) for row in texts)
    timings: dict[Piece, Timing] = {
        "read": Timing(reading, num_read, len(requests)),
        "write": Timing(fit(points[0], points[-1]), len(texts), len(requests)),
    }
    return timings, points[-1].calls / ANSWERS, distinct / (num * len(texts))


def _reading(
    captioner: BatchedCaptioner, prompt: Prompt, requests: Sequence[CaptionRequest]
) -> tuple[Cost, int]:
    """Return the cost of a question's token, and the questions that it was measured with."""
    tokens: dict[int, int] = {}

    def read(rows: int) -> None:
        with profiling.metering() as spent:
            captioner.yes_probability(prompt, requests[:rows], "measure")
        tokens[rows] = spent.tokens or rows  # which not every captioner counts

    points = [Point(1, tokens[rows], took) for rows, took in time_rows(read, len(requests))]
    return fit(points[0], points[-1]), max(tokens)


def _writing(
    captioner: BatchedCaptioner,
    prompt: Prompt,
    requests: Sequence[CaptionRequest],
    settings: CaptioningSettings,
    reading: Cost,
) -> tuple[list[Point], list[list[Answer]]]:
    """Return the seconds of decoding by steps and tokens, and the answers of the last point."""
    metrics: dict[int, profiling.StageMetrics] = {}
    texts: list[list[Answer]] = []
    temperatures = [0.0] + [settings.temperature] * (ANSWERS - 1)

    def write(rows: int) -> None:
        limit = settings.max_new_tokens
        with profiling.metering() as metrics[rows]:
            texts[:] = captioner.generate(
                prompt, requests[:rows], limit, temperatures, 0, "measure"
            )

    points = []
    for rows, took in time_rows(write, len(requests)):
        tokens = metrics[rows].tokens_written or ANSWERS * rows * settings.max_new_tokens
        read = reading.call + reading.unit * (metrics[rows].tokens or rows)
        points.append(Point(tokens / rows, tokens, max(took - read, 0.1 * took)))
    return points, texts


def _training(config: RunConfig, models: Models, train: TrainSplit, size: int) -> Timing:
    """Measure a triplet in a step of at most `size`.

    The loss is InfoNCE, which needs no mined images; the time of the loss itself is negligible.
    """
    backbone = models.load(models.embedder(None))
    backbone.make_trainable(config.training, 0)
    accelerate = create_accelerator()
    features = VisionCache(backbone, train.images, config.cache / "vision", config.runtime)

    batch = BatchSampler(train.triplets, [], [], size, 0.0, 0, 0, False)[0]
    features.precompute([*(query.reference for query in batch.queries), *batch.candidates])

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

    points = time_rows(work, size)
    accelerate.free_memory()
    first, last = (Point(1, rows, took) for rows, took in (points[0], points[-1]))
    return Timing(fit(first, last), points[-1][0], config.training.batch_size)


def _repeat_to(rows: Sequence[Any], num: int) -> list[Any]:
    """Return the first `num` rows, repeated where there are fewer."""
    return [rows[i % len(rows)] for i in range(num)]
