"""Vectors of images and of texts in N processes, the same whatever N is.

Images and texts are cut into batches by their numbers; a process gets whole batches that follow one
another, and one thread on a CPU, so what a batch gives depends on nothing but the batch. One
process is this one. Several are launched, and leave their vectors as files.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
import torch
from pydantic import TypeAdapter

from cirloop.artifacts.atomic import write_json
from cirloop.backbones import EmbedInput
from cirloop.backbones.base import Backbone
from cirloop.backbones.prefetch import prefetch_images
from cirloop.backbones.similarity import mean_pool
from cirloop.backbones.transfer import one_behind
from cirloop.config.runtime import Runtime
from cirloop.data.images import FileImages
from cirloop.distributed import launcher, process
from cirloop.distributed.jobs import Job
from cirloop.monitoring.console import no_progress, progress
from cirloop.retrieval.arrays import Floats
from cirloop.retrieval.embed import (
    DecodedImages,
    NonFiniteEmbedding,
    Progress,
    begin_embedding,
    embed_texts,
)
from cirloop.retrieval.sentence_encoder import SentenceEncoder
from cirloop.tools.add_negatives.config import AddNegativesConfig
from cirloop.tools.add_negatives.samples import UniqueItems
from cirloop.types import ImageId, UserError

T = TypeVar("T")
logger = logging.getLogger(__name__)
Span = tuple[int, int]
"""From and to, of rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeJob(Job):
    """The images and texts of all processes, and the flags that say by what they are embedded."""

    options: AddNegativesConfig
    images: tuple[ImageId, ...]
    texts: tuple[str, ...]
    spans: tuple[tuple[Span, Span], ...]
    """Each process's images and texts."""


def encode(
    options: AddNegativesConfig, items: UniqueItems
) -> tuple[Floats, Floats, list[dict[str, Any]]]:
    """Embed every image and text: return unit-norm vectors (V, D) and (T, E), and what each process
    says of itself. Raises UserError with what a process says that failed."""
    images = _spans(len(items.images), options)
    texts = _spans(len(items.texts), options)
    spans = [both for both in zip(images, texts, strict=True) if any(map(_length, both))]
    num = len(spans)
    if num < options.num_gpus:
        batches = -(-len(items.images) // options.batch_size)
        logger.info("%d batches keep %d of %d processes busy", batches, num, options.num_gpus)
    with TemporaryDirectory(prefix="cirloop-") as directory:
        job = EncodeJob(
            directory=Path(directory),
            options=options,
            images=items.images,
            texts=items.texts,
            spans=tuple(spans),
        )
        if num == 1:
            threads = torch.get_num_threads()
            try:
                encode_shard(job, 0)
            finally:
                torch.set_num_threads(threads)
        else:
            launcher.run_module(__name__, job, Runtime(num_processes=num), "embed: the processes")
        notes = [job.directory / f"{number}_done.json" for number in range(num)]
        shards = [json.loads(path.read_text("utf-8")) for path in notes]
        assert len({(done["model"], done["text_model"]) for done in shards}) == 1, "other models"
        return _gather(job, "images"), _gather(job, "texts"), shards


def _spans(num: int, options: AddNegativesConfig) -> list[Span]:
    """Return each process's rows: whole batches, as even as can be."""
    size = options.batch_size
    batches = -(-num // size)
    ends = [batches * shard // options.num_gpus for shard in range(options.num_gpus + 1)]
    return list(pairwise(min(num, size * end) for end in ends))


def _length(span: Span) -> int:
    return span[1] - span[0]


def _gather(job: EncodeJob, kind: str) -> Floats:
    paths = [job.directory / f"{number}_{kind}.npy" for number in range(len(job.spans))]
    return np.concatenate([np.load(path) for path in paths if path.exists()])


def encode_shard(job: EncodeJob, number: int) -> None:
    """Do the part of process `number`, with one thread: on a CPU their number changes the last
    bits. Writes `N_images.npy`, `N_texts.npy` and `N_done.json`."""
    options = job.options
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        torch.cuda.set_device(options.gpu_id + number)
    began = time.monotonic()
    backbone = options.model.build(options.adapter)
    encoder = SentenceEncoder(options.text_encoder) if options.text_encoder else None
    seconds = {"load": time.monotonic() - began}
    image_span, text_span = job.spans[number]
    images = _batches(job.images, image_span, options.batch_size)
    texts = _batches(job.texts, text_span, options.batch_size)
    shown: Progress = progress if number == 0 else no_progress
    vectors = _image_vectors(backbone, images, options, shown)
    seconds["images"] = _save(job.directory / f"{number}_images.npy", vectors)
    text_vectors = encoder.vectors if encoder else partial(embed_texts, backbone)
    vectors = map(text_vectors, shown(texts, "embed texts"))
    seconds["texts"] = _save(job.directory / f"{number}_texts.npy", vectors)
    done = {
        "model": backbone.fingerprint,
        "text_model": (encoder or backbone).fingerprint,
        "texts_cut": encoder.cut if encoder else 0,
        "images": image_span,
        "texts": text_span,
        "seconds": seconds,
    }
    done["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    write_json(job.directory / f"{number}_done.json", done)


def _batches(rows: Sequence[T], span: Span, size: int) -> list[Sequence[T]]:
    start, end = span
    return [rows[at : min(at + size, end)] for at in range(start, end, size)]


def _image_vectors(
    backbone: Backbone,
    batches: Sequence[Sequence[ImageId]],
    options: AddNegativesConfig,
    shown: Progress,
) -> Iterator[Floats]:
    """Yield the vectors (B, D) of each batch, as of gallery images. No features are kept, since
    each image is wanted once."""
    files = FileImages({image: options.image_dir / image for batch in batches for image in batch})
    loaded = prefetch_images(batches, files, backbone.prepare_images, options.num_workers)
    begun = (
        begin_embedding(
            backbone, DecodedImages(backbone, *decoded), [EmbedInput(image) for image in batch]
        )
        for batch, decoded in zip(shown(batches, "embed images"), loaded, strict=True)
    )
    with closing(loaded):
        for vectors in one_behind(begun):
            yield mean_pool(vectors())


def _save(path: Path, vectors: Iterable[Floats]) -> float:
    """Write vectors, if there are any, and return the seconds that they took."""
    began = time.monotonic()
    try:
        parts = [*vectors]
    except NonFiniteEmbedding as error:
        raise UserError(f"{error}. Try --dtype float32.") from None
    if parts:
        np.save(path, np.concatenate(parts))
    return time.monotonic() - began


def main() -> None:
    """Do the part of a launched process."""
    job = TypeAdapter(EncodeJob).validate_json(Path(sys.argv[1]).read_bytes())
    process.serve(job, lambda: encode_shard(job, process.rank()))


if __name__ == "__main__":
    main()
