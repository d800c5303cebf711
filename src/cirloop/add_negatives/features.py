"""One process's share of the vectors: `python -m cirloop.add_negatives.features JOB.json`.

A job holds whole batches of images and texts. A batch is embedded the same way in whichever process it lands, and the
vectors go to .npy files, which the tool merges in order.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import TypeAdapter

from cirloop.add_negatives.encoders import EmbedderOnTexts, SentenceEncoder, TextEncoder, checked, image_vectors
from cirloop.artifacts import write_json
from cirloop.backbones import BackboneConfig
from cirloop.data.images import FileImages
from cirloop.negatives.base import Floats
from cirloop.report.terminal import start_logging
from cirloop.types import ImageId, UserError


def work(job: dict[str, Any]) -> None:
    """Write `images.npy`, `texts.npy` and last `done.json` into the job's directory; `progress` grows by a byte a
    batch."""
    goal, began = Path(job["directory"]), time.monotonic()
    settings = TypeAdapter(BackboneConfig).validate_python(job["model"])
    backbone: Any = settings.build(Path(job["adapter"]) if job["adapter"] else None)
    texts: TextEncoder = (
        SentenceEncoder(Path(job["text_encoder"])) if job["text_encoder"] else EmbedderOnTexts(backbone)
    )
    seconds = {"load": time.monotonic() - began}
    with (goal / "progress").open("wb", buffering=0) as progress:
        began = time.monotonic()
        parts = []
        for names, pictures in _decoded(job):
            parts.append(checked(image_vectors(backbone, pictures), names))
            progress.write(b".")
        _save(goal / "images.npy", parts)
        seconds["images"], began, parts = time.monotonic() - began, time.monotonic(), []
        for batch in job["texts"]:
            parts.append(checked(texts.vectors(batch), batch))
            progress.write(b".")
        _save(goal / "texts.npy", parts)
        seconds["texts"] = time.monotonic() - began
    write_json(
        goal / "done.json",
        {
            "model": backbone.fingerprint,
            "text_model": texts.fingerprint,
            "texts_cut": texts.cut,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "seconds": seconds,
        },
    )


def _decoded(job: dict[str, Any]) -> Iterator[tuple[Sequence[str], list[Image.Image]]]:
    """Batches of pictures by name; the next batch is decoded while one is embedded."""
    folder = Path(job["image_dir"])
    files = FileImages({ImageId(name): folder / name for batch in job["images"] for name in batch})
    with ThreadPoolExecutor(job["num_workers"]) as pool:
        ahead = None
        for batch in job["images"]:
            coming = (batch, [pool.submit(files.load, ImageId(name)) for name in batch])
            if ahead is not None:
                yield ahead[0], [picture.result() for picture in ahead[1]]
            ahead = coming
        if ahead is not None:
            yield ahead[0], [picture.result() for picture in ahead[1]]


def _save(path: Path, parts: list[Floats]) -> None:
    np.save(path, np.concatenate(parts) if parts else np.zeros((0, 0), np.float32))


def main() -> None:
    """Exit code 2 with the message for a user's error."""
    start_logging()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    try:
        work(json.loads(Path(sys.argv[1]).read_text("utf-8")))
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
