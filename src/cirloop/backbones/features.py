"""The vision tower's output per image, computed once and kept on disk.

Valid wherever image bytes, processor, pixel budget, vision weights and dtype are the same: across stages, rounds and
runs. A shard is one safetensors file of many images (key: image digest and patch grid), written aside and renamed, so
that several processes may write at once and a killed one leaves nothing half-written behind.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cirloop.artifacts import fingerprint
from cirloop.backbones.base import VisionInput
from cirloop.types import ImageId, Images, UserError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


class VisionFeatures:
    """Vision tokens of images by id. `encoder` has `vision_key` and `encode_images`."""

    def __init__(self, encoder: Any, images: Images, directory: Path, batch_size: int = 64, shard_size: int = 2048) -> None:
        self._encoder, self._images = encoder, images
        self._batch_size, self._shard_size = batch_size, shard_size
        self._directory = directory / encoder.vision_key[:16]
        self._index: dict[str, tuple[Path, str]] = {}
        self._open: dict[Path, Any] = {}
        self._memory: dict[ImageId, VisionInput] = {}
        self._read: set[Path] = set()
        self._refresh()

    def _refresh(self) -> None:
        for path in sorted(self._directory.glob("*.safetensors")):
            if path in self._read:
                continue
            try:
                with safe_open(path, framework="pt") as shard:
                    for key in shard.keys():  # noqa: SIM118 - not a dict
                        self._index.setdefault(key.split("@")[0], (path, key))
            except SafetensorError as error:
                raise UserError(f"cached vision features {path} are damaged ({error}). Delete the file; it is remade.") from None
            self._read.add(path)

    def get(self, images: Sequence[ImageId]) -> list[VisionInput]:
        """Vision tokens of `images`, in order; what is not cached yet is computed and kept."""
        self.ensure(images)
        return [self._memory[image] for image in images]

    def ensure(self, images: Sequence[ImageId], progress: Any = iter) -> None:
        """Have `images` in memory; `progress` wraps the list of batches that must be computed."""
        missing = []
        for image in dict.fromkeys(images):
            if image in self._memory:
                continue
            found = self._index.get(self._images.digest(image))
            if found is None:
                missing.append(image)
            else:
                self._memory[image] = self._load(*found)
        batches = [missing[i : i + self._batch_size] for i in range(0, len(missing), self._batch_size)]
        fresh: dict[str, torch.Tensor] = {}
        for batch in progress(batches):
            for image, made in zip(batch, self._encode(batch), strict=True):
                self._memory[image] = made
                fresh[f"{self._images.digest(image)}@{'x'.join(map(str, made.grid))}"] = made.tokens
            if len(fresh) >= self._shard_size:
                self._write(fresh)
                fresh = {}
        if fresh:
            self._write(fresh)

    def _encode(self, batch: list[ImageId]) -> list[VisionInput]:
        return list(self._encoder.encode_images([self._images.load(image) for image in batch]))

    def _load(self, path: Path, key: str) -> VisionInput:
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        t, h, w = (int(n) for n in key.split("@")[1].split("x"))
        return VisionInput(self._open[path].get_tensor(key), (t, h, w))

    def _write(self, tensors: dict[str, torch.Tensor]) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        name = fingerprint(sorted(tensors))[:24]
        aside = self._directory / f".{name}.{os.getpid()}.tmp"
        save_file(tensors, aside)
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.replace(self._directory / f"{name}.safetensors")
        self._refresh()
