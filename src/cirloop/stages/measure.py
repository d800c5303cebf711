"""Seconds of a run's work, measured before it begins: a picture in the tower, a batch embedded,
texts written and judged, a step of training. As much of each as is predicted to take `BUDGET`
seconds, at most the settings' own batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from cirloop.backbones.features import VisionFeatures
from cirloop.captioning.base import Ask
from cirloop.captioning.batched_captioner import Eyes
from cirloop.config.run import RunConfig
from cirloop.data import Dataset
from cirloop.distributed.worker import accelerator
from cirloop.retrieval.embed import embed, query_items
from cirloop.stages.models import Models
from cirloop.training.batches import Batches
from cirloop.training.config import InfoNCE
from cirloop.training.trainer import Trainer
from cirloop.types import EvalSplit, TrainSplit

BUDGET = 12.0
"""Seconds for each of the measurements, besides loading and a first try with a few rows."""
FIRST = 2
"""Rows of the first try."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one piece of work, measured with `rows` of the `of` rows that a full batch has."""

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


def timed(work: Callable[[int], object], of: int) -> Timing:
    """Seconds a row of `work(rows)`: a few rows first, then as many of `of` as fit the budget, if
    they are more."""
    rows = min(FIRST, of)
    work(rows)  # the first call also warms up
    while True:
        _wait()
        began = time.perf_counter()
        work(rows)
        _wait()
        seconds = (time.perf_counter() - began) / rows
        more = min(of, int(BUDGET / max(seconds, 1e-9)))
        if more < 2 * rows and (more <= rows or more < of):
            return Timing(seconds, rows, of)
        rows = min(
            more, 8 * rows
        )  # larger batches are faster: the prediction is made anew on the way


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _quiet(items: Any, title: str = "") -> Any:
    return items


def measure(config: RunConfig, data: Dataset, trains: bool, most_rows: int) -> dict[str, Timing]:
    """Seconds of a `picture`, a `row` embedded, an image's `text` written and judged with all its
    candidates, and a triplet of a training `step`; the last two only where the run `trains`, the
    last only where its activations are those of at most `most_rows` rows. Lets go of every model at
    the end."""
    models = Models(config)
    try:
        split = data.train if trains else data.eval_splits(config.evaluation.split)[0]
        found = _embedding(config, models, split)
        foundation = config.foundation
        writes = trains and config.num_iterations and config.captioning.enabled
        if writes and foundation.type not in ("template", "vllm"):
            found["text"] = _captioning(config, models, data.train)
        size = min(config.training.batch_size, len(data.train.triplets)) if trains else 0
        if not config.training.grad_cache_chunk_size:
            size = min(size, most_rows // 2)
        if size >= FIRST and 2 * config.training.grad_cache_chunk_size <= most_rows:
            found["step"] = _training(config, models, data.train, size)
        return found
    finally:
        models.release()


def _embedding(
    config: RunConfig, models: Models, split: TrainSplit | EvalSplit
) -> dict[str, Timing]:
    embedder, runtime = models.embedder(None), config.runtime
    queries = split.queries if isinstance(split, EvalSplit) else [t.query for t in split.triplets]
    items = _filled(query_items(queries), runtime.embed_batch_size)
    pictures = [split.images.load(item.image) for item in _filled(items, runtime.vision_batch_size)]

    def see(rows: int) -> object:
        return models.load(embedder).encode_images(pictures[:rows])

    picture = timed(see, runtime.vision_batch_size)
    size = min(
        len(items), max(FIRST, int(BUDGET / picture.seconds))
    )  # whose pictures must be encoded first
    features = models.features(embedder, split)
    features.ensure([item.image for item in items[:size]])

    def work(rows: int) -> object:
        return embed(models.load(embedder), features, items[:rows], rows, _quiet, "measure")

    row = timed(work, size)
    return {"picture": picture, "row": Timing(row.seconds, row.rows, len(items))}


def _captioning(config: RunConfig, models: Models, train: TrainSplit) -> Timing:
    settings, prompts = config.captioning, config.captioning.prompts(config.foundation)
    asks = _filled(
        [Ask(t.query.reference, t.target, t.query.text) for t in train.triplets],
        settings.batch_size,
    )
    captioner = models.captioner(models.embedder(None))
    eyes = Eyes(captioner, train.images, config.cache / "vision", len(asks), _quiet, config.runtime)
    heats = [0.0] + [settings.temperature] * (settings.num_candidates - 1)

    def work(rows: int) -> object:
        texts = eyes.write(
            prompts.rewrite, asks[:rows], settings.max_new_tokens, heats, 0, "measure"
        )
        if not settings.min_verify_probability:
            return texts
        again = [ask for ask in asks[:rows] for _ in range(settings.num_candidates)]
        return eyes.yes(prompts.verify, again[: len(asks)], "measure")

    return timed(work, len(asks))


def _training(config: RunConfig, models: Models, train: TrainSplit, size: int) -> Timing:
    """Seconds of a triplet in a step of at most `size`, without mined images beside it, and so with
    InfoNCE, which needs none: the loss itself takes no time to speak of."""
    backbone = models.load(models.embedder(None))
    backbone.make_trainable(config.training, 0)
    accelerate = accelerator()
    features = VisionFeatures(backbone, train.images, config.cache / "vision", config.runtime)

    def work(rows: int) -> object:
        settings = config.training.model_copy(
            update={"batch_size": rows, "hardest": 0, "loss": InfoNCE()}
        )
        batches = Batches(train.triplets, [], [], rows, 0.0, 0, 0, False)
        with TemporaryDirectory() as work:
            trainer = Trainer(
                backbone, features, batches, settings, 1, 0, "measure", Path(work), 0, accelerate
            )
            trainer.module.train()
            loss = trainer.engine.backward(0)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
            return loss

    made = timed(work, size)
    accelerate.free_memory()
    return Timing(made.seconds, made.rows, config.training.batch_size)


def _filled(rows: Sequence[Any], num: int) -> list[Any]:
    """The first `num` rows; where there are fewer, those again."""
    return [rows[i % len(rows)] for i in range(num)]
