"""Vectors of images and texts in N processes, the same whatever N is.

Images and texts are cut into batches by their numbers; a process gets whole batches, computes with one thread on a CPU,
and writes files that are merged in order. Its exit is the barrier; the first that fails ends the others.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from cirloop.add_negatives.config import AddNegativesConfig
from cirloop.add_negatives.samples import Distinct
from cirloop.negatives.base import Floats
from cirloop.problems import Problems
from cirloop.types import UserError

logger = logging.getLogger(__name__)
Progress = Callable[[Iterable[Any], str], Iterable[Any]]
TAIL = 15
"""Lines of a failed process's output that are shown."""
POLL = 0.2
"""Seconds between looks at the processes."""


@dataclass(frozen=True, slots=True)
class Shard:
    """A process: its images and texts, as numbers from and to, and what it said when it was done."""

    images: tuple[int, int]
    texts: tuple[int, int]
    done: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Encoded:
    """Vectors of all images (V, D) and texts (T, E), of unit norm, and the processes that made them."""

    visual_VD: Floats
    texts_TE: Floats
    shards: tuple[Shard, ...]


def num_gpus_here() -> int:
    import torch

    return torch.cuda.device_count()


def devices() -> list[dict[str, Any]]:
    """What the machine computes with, whatever of it is used: each GPU, or else the CPU, with memory in bytes."""
    import torch

    if torch.cuda.is_available():
        seen = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
        return [
            {"device": f"cuda:{number}", "name": gpu.name, "memory_bytes": gpu.total_memory}
            for number, gpu in enumerate(seen)
        ]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return [{"device": "cpu", "name": f"{platform.machine()}, {os.cpu_count()} cores", "memory_bytes": memory}]


def check_devices(options: AddNegativesConfig, problems: Problems) -> None:
    """Note GPUs asked for that are not there; where there is none at all, say that CPU processes do the work."""
    there, wanted = num_gpus_here(), options.num_gpus
    if there == 0:
        processes = "1 CPU process" if wanted == 1 else f"{wanted} CPU processes"
        logger.warning("no GPU here: %s of one thread; --num-gpus N uses N cores, --gpu-id nothing", processes)
    elif options.gpu_id + wanted > there:
        problems.add(f"--gpu-id {options.gpu_id} --num-gpus {wanted}", f"this machine has {there} GPUs, from 0")


def encode(options: AddNegativesConfig, what: Distinct, progress: Progress) -> Encoded:
    """Vectors of every image and text. Raises UserError with a failed process's last lines."""
    size, num = options.batch_size, options.num_gpus
    shares = [_shares(len(rows), size, num) for rows in (what.images, what.texts)]
    parts = [
        (images, texts) for images, texts in zip(*shares, strict=True) if images[1] > images[0] or texts[1] > texts[0]
    ]
    if len(parts) < num:
        logger.info("%d batches keep %d of %d processes busy", -(-len(what.images) // size), len(parts), num)
    output = options.result_file
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{output.stem}.", dir=output.parent) as work:
        places = [Path(work) / f"shard_{number}" for number in range(len(parts))]
        for place, (images, texts) in zip(places, parts, strict=True):
            place.mkdir()
            job = _job(options, place, what.images[slice(*images)], what.texts[slice(*texts)])
            (place / "job.json").write_text(json.dumps(job), "utf-8")
        batches = sum(-(-(end - start) // size) for part in parts for start, end in part)
        for _ in progress(_Running(places, options.gpu_id, batches), "embed images and texts"):
            pass
        done = [json.loads((place / "done.json").read_text("utf-8")) for place in places]
        assert len({(row["model"], row["text_model"]) for row in done}) == 1, "the processes used different models"
        visual, texts_ = (_merged(places, name) for name in ("images.npy", "texts.npy"))
    assert len(visual) == len(what.images) and len(texts_) == len(what.texts)
    shards = (Shard(images, texts, row) for (images, texts), row in zip(parts, done, strict=True))
    return Encoded(visual, texts_, tuple(shards))


def _shares(num: int, batch: int, shards: int) -> list[tuple[int, int]]:
    """From and to of each shard: whole batches, as even as can be."""
    batches = -(-num // batch)
    edges = [min(num, batch * (batches * shard // shards)) for shard in range(shards + 1)]
    return list(pairwise(edges))


def _job(options: AddNegativesConfig, place: Path, images: Sequence[str], texts: Sequence[str]) -> dict[str, Any]:
    def batches(rows: Sequence[str]) -> list[Sequence[str]]:
        return [rows[start : start + options.batch_size] for start in range(0, len(rows), options.batch_size)]

    given = {"image_dir", "adapter", "text_encoder", "num_workers"}
    settings = options.model_dump(mode="json", include=given) | {"model": options.model.model_dump(mode="json")}
    return {**settings, "directory": str(place), "images": batches(images), "texts": batches(texts)}


def _merged(places: Sequence[Path], name: str) -> Floats:
    parts = [part for place in places if len(part := np.load(place / name))]
    return np.concatenate(parts)


def environment(gpu: int, source: Path) -> dict[str, str]:
    """A process's: its GPU, and one thread, since on a CPU the number of threads changes the last bits."""
    names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    paths = os.pathsep.join(filter(None, [str(source), os.environ.get("PYTHONPATH")]))
    visible = {"CUDA_VISIBLE_DEVICES": names[gpu] if names else str(gpu)} if num_gpus_here() else {}
    return {**os.environ, **threads, **visible, "PYTHONPATH": paths, "TOKENIZERS_PARALLELISM": "false"}


class _Running:
    """The processes, as one item per finished batch of any of them."""

    def __init__(self, places: Sequence[Path], gpu: int, batches: int) -> None:
        self._places, self._gpu, self._batches = places, gpu, batches

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[int]:
        source = Path(__file__).parent.parent.parent
        running: list[subprocess.Popen[bytes]] = []
        try:
            for number, place in enumerate(self._places):
                command = [sys.executable, "-m", "cirloop.add_negatives.features", str(place / "job.json")]
                with (place / "log").open("wb") as log:
                    given = environment(self._gpu + number, source)
                    running.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=given))
            yield from self._watch(running)
        finally:
            for process in running:
                if process.poll() is None:
                    process.terminate()
                process.wait()

    def _watch(self, running: Sequence[subprocess.Popen[bytes]]) -> Iterator[int]:
        seen, over = 0, False
        while not over:
            codes = [process.poll() for process in running]
            over = all(code == 0 for code in codes)
            for number, code in enumerate(codes):
                if code:
                    lines = (self._places[number] / "log").read_text("utf-8", "replace").splitlines()
                    said = "\n  ".join(lines[-TAIL:])
                    raise UserError(f"process {number} of {len(running)} ended with exit code {code}:\n  {said}")
            done = sum(path.stat().st_size for place in self._places if (path := place / "progress").exists())
            yield from range(seen, done)
            seen = done
            if not over:
                time.sleep(POLL)
