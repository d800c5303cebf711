"""Items to vectors, through the one encoder that mining, checks, training and evaluation share."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cirloop import cost
from cirloop.backbones import Item, flops
from cirloop.backbones.base import each_once
from cirloop.backbones.features import VisionFeatures
from cirloop.types import Query

logger = logging.getLogger(__name__)
Progress = Callable[[Iterable[Any], str], Iterable[Any]]


def query_items(queries: Sequence[Query]) -> list[Item]:
    return [Item(query.reference, query.text) for query in queries]


def batches_of(lengths: Sequence[int], batch_size: int, max_tokens: int = 0) -> list[list[int]]:
    """Rows in batches of like lengths, shortest first, each row once: `batch_size` rows, or with `max_tokens` as many
    as their number times the longest's length allows, and never none."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    if not max_tokens:
        return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    batches: list[list[int]] = []
    for row in order:  # each is the longest so far
        if batches and (len(batches[-1]) + 1) * lengths[row] <= max_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def embed(
    backbone: Any,
    features: VisionFeatures,
    items: Sequence[Item],
    batch_size: int,
    progress: Progress,
    title: str,
    max_tokens: int = 0,
) -> npt.NDArray[np.float32]:
    """Unit-norm embeddings (N, D) of `items`, (N, M, D) of images with several, batched by length (`batches_of`); equal
    items are embedded once. A failed item stops the stage, named."""
    if not items:
        return np.zeros((0, 0), np.float32)
    unique, places = each_once(items)
    features.ensure([item.image for item in unique], lambda batches: progress(batches, f"{title}: vision"))
    rows, made = embed_share(backbone, features, unique, batch_size, progress, title, max_tokens)
    return made[np.argsort(rows)[places]]


@torch.inference_mode()
def embed_share(
    backbone: Any,
    features: VisionFeatures,
    items: Sequence[Item],
    batch_size: int,
    progress: Progress,
    title: str,
    max_tokens: int = 0,
    share: tuple[int, int] = (0, 1),
) -> tuple[list[int], npt.NDArray[np.float32]]:
    """With `share` (i, n) every n-th batch of `items` from the i-th on: their rows, and those rows' embeddings. The
    images have been ensured."""
    began = time.monotonic()
    grids = features.grids([item.image for item in items])
    lengths = [backbone.length(item, grid) for item, grid in zip(items, grids, strict=True)]
    batches = batches_of(lengths, batch_size, max_tokens)[share[0] :: share[1]]
    backbone.module.eval()
    made, tokens, padding, formula = [], 0, 0, flops.language(backbone)
    for rows in cost.traced(progress(batches, title), "embedding"):
        batch = [items[i] for i in rows]
        inputs = backbone.inputs(batch, features.get([item.image for item in batch]))
        read, empty = flops.count(formula, inputs)
        tokens, padding = tokens + read, padding + empty
        cost.add(items=len(batch))
        vectors = backbone.module(inputs).cpu().numpy()
        _check(batch, vectors)
        made.append(vectors)
    done = [row for rows in batches for row in rows]
    logger.info(
        "%s: %d of %d unlike items in %d batches, %.1f%% padding, %.1f s",
        title, len(done), len(items), len(batches), 100 * padding / max(1, tokens + padding), time.monotonic() - began,
    )  # fmt: skip
    return done, np.concatenate(made) if made else np.zeros((0, 0), np.float32)


def _check(batch: Sequence[Item], vectors: npt.NDArray[np.float32]) -> None:
    bad = [batch[i] for i in np.flatnonzero(~np.isfinite(vectors.reshape(len(vectors), -1)).all(axis=1)).tolist()]
    if bad:
        raise RuntimeError(
            f"embedding is not finite: image {bad[0].image!r}, text {bad[0].text!r} ({len(bad)} in the batch)"
        )
