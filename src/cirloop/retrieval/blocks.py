"""Vectors on disk or in memory, scored block after block. Letters as in `top.py`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cirloop.backbones.similarity import similarity
from cirloop.types import UserError

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]
BLOCK_NUMBERS = 1 << 25
"""Scores, or numbers of a gallery shard, in memory at once."""
# For the whole process and not around the call: filters that threads set and put back would get mixed up.
warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # memory-mapped vectors are only read
warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")


def checked(vectors: Any, name: str) -> Any:
    """The vectors, which are finite numbers in two dimensions, or three where an image has several. Raises UserError
    otherwise, with the first bad row."""
    shaped = getattr(vectors, "ndim", 0) in (2, 3) and 0 not in vectors.shape[1:]
    if not shaped or vectors.dtype not in (np.float16, np.float32):
        found = f"{getattr(vectors, 'dtype', type(vectors).__name__)} {getattr(vectors, 'shape', '')}"
        raise UserError(f"{name} must be a float16 or float32 array of rows and dimensions, found {found}.")
    step = shard_size(vectors)
    for start in range(0, len(vectors), step):
        part = vectors[start : start + step]
        bad = np.flatnonzero(~np.isfinite(part.reshape(len(part), -1)).all(axis=1))
        if len(bad):
            raise UserError(f"{name}: row {start + int(bad[0])} is not finite (NaN or infinity).")
    return vectors


def score_blocks(queries_QD: Any, gallery_GD: Any, numbers: Rows, device: str = "cpu") -> Iterator[tuple[Rows, Floats]]:
    """Float32 scores (B, G) of the queries `numbers`, block by block, each with its numbers."""
    device = first(device)
    each = int(np.prod(gallery_GD.shape[1:-1], dtype=np.int64))  # vectors of an image
    size, step = max(1, min(1024, BLOCK_NUMBERS // max(1, len(gallery_GD) * each))), shard_size(gallery_GD)
    held = tensor(gallery_GD, device) if len(gallery_GD) <= step else None  # a small gallery is converted once
    for start in range(0, len(numbers), size):
        rows = numbers[start : start + size]
        queries = tensor(queries_QD[rows], device)
        if held is not None:
            yield rows, similarity(queries, held).cpu().numpy()
            continue
        scores_BG = np.empty((len(rows), len(gallery_GD)), np.float32)
        for at in range(0, len(gallery_GD), step):
            part = similarity(queries, tensor(gallery_GD[at : at + step], device))
            scores_BG[:, at : at + step] = part.cpu().numpy()
        yield rows, scores_BG


def first(device: str) -> str:
    """Of several devices, named with commas between them, the one for what is not shared out."""
    return device.split(",")[0]


def shard_size(gallery_GD: Any) -> int:
    return max(1, BLOCK_NUMBERS // int(np.prod(gallery_GD.shape[1:], dtype=np.int64)))


def tensor(vectors: Any, device: str) -> torch.Tensor:
    """Float32, on the CPU without a copy where they are that already: memory-mapped ones then stay on the disk."""
    return torch.from_numpy(np.ascontiguousarray(vectors, np.float32)).to(device)
