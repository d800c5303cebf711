"""Vectors of images and of texts in N processes, the same whatever N is.

Images and texts are cut into batches by their numbers; a process gets whole batches that follow one
another, and one thread on a CPU, so what a batch gives depends on nothing but the batch.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import platform
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from cirloop.retrieval.arrays import Floats
from cirloop.tools.add_negatives.config import AddNegativesConfig
from cirloop.tools.add_negatives.samples import UniqueItems
from cirloop.types import ImageId, UserError
from cirloop.validation import ValidationReport

logger = logging.getLogger(__name__)
Progress = Callable[[Iterable[Any], str], Iterable[Any]]
Batches = Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Shard:
    """A process: its images and texts, as numbers from and to, and what it says of itself when it
    is done."""

    images: tuple[int, int]
    texts: tuple[int, int]
    done: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Encoded:
    """Vectors of all images (V, D) and texts (T, E), of unit norm, and the processes that made
    them."""

    visual_VD: Floats
    texts_TE: Floats
    shards: tuple[Shard, ...]


class _Worker:
    """The encoders of a process, which takes its batches of images in turn."""

    def __init__(self, options: AddNegativesConfig, images: Batches, gpu: int | None) -> None:
        if gpu is not None:  # before anything looks at the GPUs
            names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
            os.environ["CUDA_VISIBLE_DEVICES"] = names[gpu] if names else str(gpu)
        import torch

        from cirloop.backbones.prefetch import prefetch_images
        from cirloop.data.images import FileImages
        from cirloop.tools.add_negatives.encoders import EmbedderOnTexts, SentenceEncoder

        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the tool ends its processes itself
        torch.set_num_threads(1)  # on a CPU their number changes the last bits
        began = time.monotonic()
        folder = options.image_dir
        model: Any = options.model
        self.backbone = model.build(options.adapter)
        self.texts: Any = EmbedderOnTexts(self.backbone)
        if options.text_encoder is not None:
            self.texts = SentenceEncoder(options.text_encoder)
        self.seconds = {"load": time.monotonic() - began, "images": 0.0, "texts": 0.0}
        self.device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        files = FileImages({ImageId(name): folder / name for batch in images for name in batch})
        batches = [[ImageId(name) for name in batch] for batch in images]
        self.pictures = prefetch_images(
            batches, files, self.backbone.prepare_images, options.num_workers
        )


_worker: list[_Worker] = []
"""The one of this process."""


def _start(options: AddNegativesConfig, images: Batches, gpu: int | None) -> None:
    _worker[:] = [_Worker(options, images, gpu)]


def _encode(kind: str, batch: Sequence[str]) -> Floats:
    """Vectors of a batch: the texts, or the images that come next, whose names these are."""
    from cirloop.tools.add_negatives.encoders import finite, image_vectors

    [worker], began = _worker, time.monotonic()
    vectors = (
        worker.texts.vectors(batch)
        if kind == "texts"
        else image_vectors(worker.backbone, *next(worker.pictures))
    )
    worker.seconds[kind] += time.monotonic() - began
    return finite(vectors, batch)


def _end() -> dict[str, Any]:
    [worker] = _worker
    return {
        "model": worker.backbone.fingerprint,
        "text_model": worker.texts.fingerprint,
        "texts_cut": worker.texts.cut,
        "device": worker.device,
        "seconds": worker.seconds,
    }


def encode(options: AddNegativesConfig, what: UniqueItems, progress: Progress) -> Encoded:
    """Vectors of every image and text. Raises UserError with what a process says that failed."""
    size = options.batch_size
    num = options.num_gpus
    spans = zip(
        _spans(len(what.images), size, num), _spans(len(what.texts), size, num), strict=True
    )
    parts = [
        (images, texts) for images, texts in spans if images[1] > images[0] or texts[1] > texts[0]
    ]
    if len(parts) < num:
        logger.info(
            "%d batches keep %d of %d processes busy", -(-len(what.images) // size), len(parts), num
        )
    tasks: dict[str, list[Future[Floats]]] = {"images": [], "texts": []}
    ends: list[Future[dict[str, Any]]] = []
    process_of: dict[Future[Any], int] = {}
    with ExitStack() as stack:
        for number, (images, texts) in enumerate(parts):
            pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
            stack.callback(pool.shutdown, cancel_futures=True)
            batches = {
                "images": _batches(what.images, images, size),
                "texts": _batches(what.texts, texts, size),
            }
            gpu = options.gpu_id + number if num_gpus_here() else None
            start = pool.submit(_start, options, batches["images"], gpu)
            own = {
                kind: [pool.submit(_encode, kind, batch) for batch in batches[kind]]
                for kind in batches
            }
            ends.append(pool.submit(_end))
            for kind in tasks:
                tasks[kind] += own[kind]
            process_of |= dict.fromkeys([start, *own["images"], *own["texts"], ends[-1]], number)
        for _, future in zip(
            progress([*process_of], "embed images and texts"), as_completed(process_of), strict=True
        ):
            _check(future, process_of[future], len(parts))
    done = [end.result() for end in ends]
    assert len({(row["model"], row["text_model"]) for row in done}) == 1, (
        "the processes used different models"
    )
    visual_VD, texts_TE = (
        np.concatenate([future.result() for future in tasks[kind]]) for kind in tasks
    )
    shards = (Shard(images, texts, row) for (images, texts), row in zip(parts, done, strict=True))
    return Encoded(visual_VD, texts_TE, tuple(shards))


def _check(future: Future[Any], number: int, num: int) -> None:
    """Raise UserError where a process failed."""
    try:
        future.result()
    except UserError as error:
        raise UserError(f"process {number} of {num}: {error}") from None
    except BrokenProcessPool:
        raise UserError(
            f"process {number} of {num} was ended from outside, or for want of memory."
        ) from None


def _spans(num: int, batch: int, shards: int) -> list[tuple[int, int]]:
    """From and to of each shard: whole batches, as even as can be."""
    batches = -(-num // batch)
    return list(
        pairwise(min(num, batch * (batches * shard // shards)) for shard in range(shards + 1))
    )


def _batches(rows: Sequence[str], span: tuple[int, int], size: int) -> Batches:
    return [rows[start : min(start + size, span[1])] for start in range(*span, size)]


def num_gpus_here() -> int:
    """GPUs of this machine that this program may use."""
    import torch

    return torch.cuda.device_count()


def devices() -> list[dict[str, Any]]:
    """Return what the machine computes with, whatever of it is used: each GPU, or else the CPU,
    with memory in bytes."""
    import torch

    seen = [torch.cuda.get_device_properties(number) for number in range(num_gpus_here())]
    if seen:
        rows = [(f"cuda:{number}", gpu.name, gpu.total_memory) for number, gpu in enumerate(seen)]
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        rows = [("cpu", f"{platform.machine()}, {os.cpu_count()} cores", memory)]
    return [
        {"device": device, "name": name, "memory_bytes": memory} for device, name, memory in rows
    ]


def check_devices(options: AddNegativesConfig, problems: ValidationReport) -> None:
    """Note GPUs asked for that are not there; where there is none at all, say that CPU processes do
    the work."""
    there = num_gpus_here()
    wanted = options.num_gpus
    if there == 0:
        processes = "1 CPU process" if wanted == 1 else f"{wanted} CPU processes"
        logger.warning(
            "no GPU here: %s of one thread; --num-gpus N uses N cores, --gpu-id nothing", processes
        )
    elif options.gpu_id + wanted > there:
        problems.add(
            f"--gpu-id {options.gpu_id} --num-gpus {wanted}",
            f"this machine has {there} GPUs, from 0",
        )
