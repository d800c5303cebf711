"""A gallery's vectors on disk, by the content of its images, one file for each model and gallery.

`digests` (N, 32) are the SHA-256 of the images, sorted, and row i of `vectors`, (N, D) or (N, M,
D), is of image i: a renamed image keeps its vector, and two equal ones share it. The file is
written aside, synced and renamed, so that a killed process leaves the one before, and of two at
once the later stays. It holds the model's fingerprint and a CRC-32 of each array; a file that does
not agree is made again. One file, so that it always agrees with itself.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import stat
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open

from cirloop.artifacts.fs import remove_stale_temp, save_tensors, sync_directory, with_filename
from cirloop.artifacts.store import fingerprint
from cirloop.backbones import EmbedInput
from cirloop.backbones.base import Backbone
from cirloop.backbones.features import VisionCache
from cirloop.config.runtime import Runtime
from cirloop.monitoring.console import progress
from cirloop.retrieval.embed import embed
from cirloop.tools.search.gallery import SearchGallery
from cirloop.types import ImageId

logger = logging.getLogger(__name__)
Vectors = npt.NDArray[np.float32]
Known = Mapping[str, Vectors]
SCHEMA = "1"
PIECE = 8192
"""Images embedded before the index is written; what a killed process has to do again, at most."""


class Index:
    """The index of a gallery in `directory`, by the model with `fingerprint`. `key` stands for the
    gallery."""

    def __init__(self, directory: Path, model: str, key: str) -> None:
        self._model = model
        self.path = directory / f"{fingerprint([model, key])[:24]}.safetensors"

    def read(self) -> dict[str, Vectors]:
        """Vectors by digest; none, with a warning, where the file is damaged."""
        try:
            if not stat.S_ISREG(self.path.stat().st_mode):
                raise ValueError("it is no regular file")
            # Read, not mapped, which opens the path a second time: another index may be there by
            # then.
            with safe_open(self.path, framework="pt", backend="pread") as file:
                about = file.metadata()
                tensors = {name: file.get_tensor(name) for name in ("digests", "vectors")}
            return self._checked(json.loads((about or {})["about"]), tensors)
        except FileNotFoundError:
            return {}
        except (SafetensorError, ValueError, LookupError, AttributeError) as error:
            logger.warning("the index %s is damaged (%s): made again", self.path, error)
            return {}

    def _checked(self, about: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, Vectors]:
        """Read vectors by digest. Raises ValueError, LookupError or AttributeError where the file
        is not what `write` made."""
        digests = tensors["digests"]
        vectors = tensors["vectors"]
        if (about.get("schema"), about.get("model")) != (SCHEMA, self._model):
            raise ValueError("it is of another model or version")
        if about["crc32"] != {name: _checksum(name, tensor) for name, tensor in tensors.items()}:
            raise ValueError("its checksums do not agree")
        if (
            digests.shape != (len(vectors), 32)
            or vectors.ndim not in (2, 3)
            or vectors.dtype != torch.float32
        ):
            raise ValueError(f"it holds {tuple(digests.shape)} and {tuple(vectors.shape)}")
        rows: Vectors = vectors.numpy()
        return {bytes(digest).hex(): row for digest, row in zip(digests.numpy(), rows, strict=True)}

    def write(self, known: Known) -> None:
        """In place of what is there. Raises OSError with the file named."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale_temp(self.path.parent)
        order = sorted(known)
        digests = np.frombuffer(bytes.fromhex("".join(order)), np.uint8).reshape(-1, 32)
        tensors = {
            "digests": torch.from_numpy(digests.copy()),
            "vectors": torch.from_numpy(np.stack([known[digest] for digest in order])),
        }
        sums = {name: _checksum(name, tensor) for name, tensor in tensors.items()}
        aside = self.path.with_name(f".{self.path.stem}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
        try:
            with with_filename(aside):
                save_tensors(
                    aside,
                    tensors,
                    {
                        "about": json.dumps(
                            {"schema": SCHEMA, "model": self._model, "crc32": sums}, sort_keys=True
                        )
                    },
                )
                sync_directory(aside)
            aside.replace(self.path)
        finally:
            aside.unlink(missing_ok=True)
        sync_directory(self.path.parent)


def _checksum(name: str, tensor: torch.Tensor) -> str:
    """Of a tensor's name, type, shape and bytes."""
    head = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
    content: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{zlib.crc32(content, head):08x}"


def gallery_vectors(
    index: Index,
    backbone: Backbone,
    features: VisionCache,
    gallery: SearchGallery,
    runtime: Runtime,
) -> Vectors:
    """Vectors (N, D) or (N, M, D) of the gallery, in the order of its ids. What the index lacks is
    embedded, and what is no longer in the gallery is dropped from it."""
    digests = [
        gallery.images.digest(image) for image in progress(gallery.ids, f"read {gallery.name}")
    ]
    known = index.read()
    image_of = dict(zip(digests, gallery.ids, strict=True))
    gone = known.keys() - image_of.keys()
    kept = {digest: vector for digest, vector in known.items() if digest not in gone}
    new = sorted(image_of.keys() - kept.keys())
    vector_of = _embedded(
        index, backbone, features, [(d, image_of[d]) for d in new], kept, runtime, gallery.name
    )
    if gone and not new:
        index.write(vector_of)
    logger.info(
        "%s: %d images, %d embedded now, %d in the index before, %d no longer there and dropped",
        gallery.name,
        len(digests),
        len(new),
        len(kept),
        len(gone),
    )
    return np.stack([vector_of[digest] for digest in digests])


def _embedded(
    index: Index,
    backbone: Backbone,
    features: VisionCache,
    new: Sequence[tuple[str, ImageId]],
    kept: Known,
    runtime: Runtime,
    name: str,
) -> dict[str, Vectors]:
    """`kept` with the vectors of the images in `new` (digest and id), written after each
    piece."""
    vector_of = dict(kept)
    for start in range(0, len(new), PIECE):
        piece = new[start : start + PIECE]
        title = f"embed {name}" + (f" from {start:,} of {len(new):,}" if len(new) > PIECE else "")
        items = [EmbedInput(image) for _, image in piece]
        vectors = embed(
            backbone,
            features,
            items,
            runtime.embed_batch_size,
            progress,
            title,
            runtime.max_tokens_per_batch,
        )
        vector_of |= {digest: vector for (digest, _), vector in zip(piece, vectors, strict=True)}
        index.write(vector_of)
    return vector_of
