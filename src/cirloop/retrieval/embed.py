"""Embedding: items to vectors, through the one encoder that mining, captions' checks, training and
evaluation share."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from cirloop.backbones import EmbedInput
from cirloop.backbones.base import (
    Backbone,
    ImageEncoder,
    ImageFeatures,
    PreparedImages,
    deduplicate,
)
from cirloop.backbones.features import VisionCache
from cirloop.backbones.oom_retry import run_with_oom_split
from cirloop.backbones.transfer import one_behind, to_host
from cirloop.monitoring import profiling
from cirloop.types import ImageId, Query

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)
WAY_OUT = "Set model.max_pixels lower, or model.dtype bfloat16, or use a device with more memory."
Progress = Callable[[Iterable[Any], str], Iterable[Any]]


class VisionSource(Protocol):
    """Source of the images' vision features."""

    def get(self, images: Sequence[ImageId], /) -> Sequence[ImageFeatures]: ...


class DecodedImages:
    """The vision features of images in memory, in their order; they are kept nowhere."""

    def __init__(
        self,
        encoder: ImageEncoder,
        images: Sequence[Image.Image],
        prepared: PreparedImages | None = None,
    ) -> None:
        """Take `prepared` where `encoder.prepare_images` was already called for the images."""
        self._encoder = encoder
        self._images = images
        self._prepared = prepared

    def get(self, images: Sequence[ImageId], /) -> Sequence[ImageFeatures]:
        assert len(images) == len(self._images), "all images are embedded at once"
        return self._encoder.encode_images(self._images, self._prepared)


class NonFiniteEmbedding(RuntimeError):
    """An embedding with NaN or infinity; the message names its input."""


def query_items(queries: Sequence[Query]) -> list[EmbedInput]:
    return [EmbedInput(query.reference, query.text, query.category) for query in queries]


def batches_of(lengths: Sequence[int], batch_size: int, max_tokens: int = 0) -> list[list[int]]:
    """Group rows into batches of one length each, shortest first.

    A batch has `batch_size` rows, or with `max_tokens` as many as fit, at least one. Nothing is
    padded, and no row depends on the others of its batch.
    """
    rows_of = defaultdict(list)
    for row, length in enumerate(lengths):
        rows_of[length].append(row)
    batches = []
    for length, rows in sorted(rows_of.items()):
        size = max(1, max_tokens // max(1, length)) if max_tokens else batch_size
        batches += [rows[i : i + size] for i in range(0, len(rows), size)]
    return batches


def embed(
    backbone: Backbone,
    features: VisionCache,
    items: Sequence[EmbedInput],
    batch_size: int,
    progress: Progress,
    title: str,
    max_tokens: int = 0,
) -> npt.NDArray[np.float32]:
    """Return unit-norm embeddings (N, D) of `items`, (N, M, D) of images with several vectors.

    Items are batched by length (`batches_of`), and equal items are embedded once. Raises
    RuntimeError with the item whose embedding is not finite.
    """
    if not items:
        return np.zeros((0, 0), np.float32)
    unique, index_of = deduplicate(items)
    features.precompute(
        [item.image for item in unique], lambda batches: progress(batches, f"{title}: vision")
    )
    rows, vectors = embed_shard(backbone, features, unique, batch_size, progress, title, max_tokens)
    return vectors[np.argsort(rows)[index_of]]


@torch.inference_mode()
def embed_shard(
    backbone: Backbone,
    features: VisionCache,
    items: Sequence[EmbedInput],
    batch_size: int,
    progress: Progress,
    title: str,
    max_tokens: int = 0,
    shard: tuple[int, int] = (0, 1),
) -> tuple[list[int], npt.NDArray[np.float32]]:
    """Embed with `shard` (i, n) every n-th batch of `items` from the i-th on: return their rows,
    and those rows' embeddings. The vision features of all images must be cached."""
    began = time.monotonic()
    grids = features.grids([item.image for item in items])
    lengths = [
        backbone.sequence_length(item, grid) for item, grid in zip(items, grids, strict=True)
    ]
    batches = batches_of(lengths, batch_size, max_tokens)[shard[0] :: shard[1]]
    backbone.module.eval()

    def vectors_of(batch: Sequence[EmbedInput]) -> torch.Tensor:
        inputs = backbone.inputs(batch, features.get([item.image for item in batch]))
        vectors: torch.Tensor = backbone.module(inputs)
        profiling.add_tokens(inputs)
        return vectors

    def computed() -> Iterator[tuple[Sequence[EmbedInput], Callable[[], torch.Tensor]]]:
        for rows in profiling.profile_batches(progress(batches, title), "embedding"):
            batch = [items[i] for i in rows]
            vectors = torch.cat(run_with_oom_split(vectors_of, batch, "items to embed", WAY_OUT))
            profiling.add(items=len(batch))
            yield batch, to_host(vectors)

    embedded: list[npt.NDArray[np.float32]] = []
    for batch, copied in one_behind(computed()):
        vectors = copied().numpy()
        check_finite(batch, vectors)
        embedded.append(vectors)
    done = [row for rows in batches for row in rows]
    logger.info(
        "%s: %d of %d unique inputs in %d batches, %.1f s",
        title,
        len(done),
        len(items),
        len(batches),
        time.monotonic() - began,
        extra={"bar": True},  # a terminal had the bar; a stage's own line has the sum
    )
    return done, np.concatenate(embedded) if embedded else np.zeros((0, 0), np.float32)


def embed_once(
    backbone: Backbone, features: VisionSource, items: Sequence[EmbedInput]
) -> npt.NDArray[np.float32]:
    """Embed a few items as one batch, without a log line: a query that a person waits for."""
    return begin_embedding(backbone, features, items)()


@torch.inference_mode()
def begin_embedding(
    backbone: Backbone, features: VisionSource, items: Sequence[EmbedInput]
) -> Callable[[], npt.NDArray[np.float32]]:
    """Begin to embed items as one batch; return what waits for their vectors and gives them."""
    backbone.module.eval()
    inputs = backbone.inputs(items, features.get([item.image for item in items]))
    copied = to_host(backbone.module(inputs))

    def vectors() -> npt.NDArray[np.float32]:
        on_host: npt.NDArray[np.float32] = copied().numpy()
        check_finite(items, on_host)
        return on_host

    return vectors


@torch.inference_mode()
def embed_texts(backbone: Backbone, texts: Sequence[str]) -> npt.NDArray[np.float32]:
    """Return unit-norm embeddings (N, D) of texts alone, without an image or a prompt, as one
    batch."""
    vectors: npt.NDArray[np.float32] = backbone.module(backbone.text_inputs(texts)).cpu().numpy()
    check_finite(texts, vectors)
    return vectors


def check_finite(batch: Sequence[EmbedInput | str], vectors: npt.NDArray[np.float32]) -> None:
    """Raise NonFiniteEmbedding with the first input, or text alone, whose vector is not finite."""
    finite_B = np.isfinite(vectors.reshape(len(vectors), -1)).all(axis=1)
    bad = np.flatnonzero(~finite_B)
    if len(bad):
        item = batch[int(bad[0])]
        image = f"image {item.image!r}, " if isinstance(item, EmbedInput) else ""
        text = item.text if isinstance(item, EmbedInput) else item
        raise NonFiniteEmbedding(
            f"embedding is not finite: {image}text {text!r} ({len(bad)} in the batch)"
        )
