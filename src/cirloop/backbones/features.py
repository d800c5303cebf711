"""The vision tower's output per image, computed once and kept on disk.

Valid wherever image bytes, processor, pixel budget, vision weights and dtype are the same: across stages, rounds and
runs. A shard is one safetensors file of many images (key: image digest and patch grid), written aside and renamed, so
that several processes may write at once and a killed one leaves nothing half-written behind.
"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cirloop.artifacts import fingerprint
from cirloop.backbones.base import Grid, VisionInput
from cirloop.types import ImageId, Images, UserError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


class VisionFeatures:
    """Vision tokens of images by id, on disk, the last used ones in memory. `encoder` has `encode_images`."""

    def __init__(
        self,
        encoder: Any,
        images: Images,
        directory: Path,
        batch_size: int = 64,
        shard_bytes: int = 256 << 20,
        memory_bytes: int = 2 << 30,
    ) -> None:
        self._encoder, self._images, self._batch_size = encoder, images, batch_size
        self._shard_bytes, self._memory_left = shard_bytes, memory_bytes
        self._directory = directory / encoder.vision_key[:16]
        self._index: dict[str, tuple[Path, str]] = {}
        self._open: dict[Path, Any] = {}
        self._memory: OrderedDict[str, VisionInput] = OrderedDict()
        self._refresh()

    def _refresh(self) -> None:
        for path in sorted(self._directory.glob("*.safetensors")):
            if path in self._open:
                continue
            try:
                self._open[path] = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise UserError(
                    f"cached vision features {path} are damaged ({error}). Delete the file; it is remade."
                ) from None
            for key in self._open[path].keys():  # noqa: SIM118 - not a dict
                self._index.setdefault(key.split("@")[0], (path, key))

    def grids(self, images: Sequence[ImageId]) -> list[Grid]:
        """Patch grids (frames, height, width) of `images`, which must have been ensured."""
        return [_grid(self._index[self._images.digest(image)][1]) for image in images]

    def get(self, images: Sequence[ImageId]) -> list[VisionInput]:
        """Vision tokens of `images`, in order; what is not there yet is computed and kept."""
        self.ensure(images)
        return [self._load(self._images.digest(image)) for image in images]

    def ensure(self, images: Sequence[ImageId], progress: Callable[[Any], Any] = iter) -> None:
        """Have `images` on disk; `progress` wraps the list of batches that must be computed."""
        missing = {d: image for image in images if (d := self._images.digest(image)) not in self._index}
        rows = list(missing.items())
        fresh: dict[str, torch.Tensor] = {}
        for batch in progress([rows[i : i + self._batch_size] for i in range(0, len(rows), self._batch_size)]):
            made = self._encoder.encode_images([self._images.load(image) for _, image in batch])
            for (digest, _), vision in zip(batch, made, strict=True):
                fresh[f"{digest}@{'x'.join(map(str, vision.grid))}"] = vision.tokens
            if sum(t.nbytes for t in fresh.values()) >= self._shard_bytes:
                self._write(fresh)
                fresh = {}
        if fresh:
            self._write(fresh)

    def _load(self, digest: str) -> VisionInput:
        if digest in self._memory:
            self._memory.move_to_end(digest)
            return self._memory[digest]
        path, key = self._index[digest]
        vision = VisionInput(self._open[path].get_tensor(key), _grid(key))
        self._memory[digest] = vision
        self._memory_left -= vision.tokens.nbytes
        while self._memory_left < 0 and len(self._memory) > 1:
            self._memory_left += self._memory.popitem(last=False)[1].tokens.nbytes
        return vision

    def _write(self, tensors: dict[str, torch.Tensor]) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        name = fingerprint(sorted(tensors))[:24]
        aside = self._directory / f".{name}.{os.getpid()}.tmp"
        save_file(tensors, aside)
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.replace(self._directory / f"{name}.safetensors")
        self._refresh()


def _grid(key: str) -> Grid:
    t, h, w = (int(n) for n in key.split("@")[1].split("x"))
    return t, h, w
