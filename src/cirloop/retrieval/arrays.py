"""Types of the arrays that retrieval works on. Needs no torch, so that settings load without it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Excluded = Rows | Sequence[Rows] | None
"""Gallery rows of each query that are not ranked: an array (Q, E), or one array per query."""


class Vectors(Protocol):
    """Vectors (N, D), or (N, M, D) of images with several: an array or a `ConcatArray`.

    float16 or float32, in memory or memory-mapped, read by slices and by arrays of rows.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def ndim(self) -> int: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, rows: slice | Rows, /) -> Vectors: ...
    def __array__(self) -> npt.NDArray[Any]: ...
