"""Items to vectors, through the one encoder that mining, checks, training and evaluation share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cirloop.backbones import Item
from cirloop.backbones.features import VisionFeatures
from cirloop.types import Query

Progress = Callable[[Iterable[Any], str], Iterable[Any]]


def query_items(queries: Sequence[Query]) -> list[Item]:
    return [Item(query.reference, query.text) for query in queries]


@torch.inference_mode()
def embed(
    backbone: Any,
    features: VisionFeatures,
    items: Sequence[Item],
    batch_size: int,
    progress: Progress,
    title: str,
) -> npt.NDArray[np.float32]:
    """Unit-norm embeddings (N, D) of `items`, (N, M, D) of images with several, batched by length. A failed item stops
    the stage, named."""
    if not items:
        return np.zeros((0, 0), np.float32)
    features.ensure([item.image for item in items], lambda batches: progress(batches, f"{title}: vision"))
    grids = features.grids([item.image for item in items])
    lengths = [backbone.length(item, grid) for item, grid in zip(items, grids, strict=True)]
    order = sorted(range(len(items)), key=lambda i: (lengths[i], i))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    backbone.module.eval()
    out: npt.NDArray[np.float32] | None = None
    for rows in progress(batches, title):
        batch = [items[i] for i in rows]
        vectors = backbone.module(backbone.inputs(batch, features.get([item.image for item in batch]))).cpu().numpy()
        bad = [batch[i] for i in np.flatnonzero(~np.isfinite(vectors.reshape(len(vectors), -1)).all(axis=1))]
        if bad:
            raise RuntimeError(
                f"embedding is not finite: image {bad[0].image!r}, text {bad[0].text!r} ({len(bad)} in the batch)"
            )
        if out is None:
            out = np.zeros((len(items), *vectors.shape[1:]), np.float32)
        out[rows] = vectors
    assert out is not None
    return out
