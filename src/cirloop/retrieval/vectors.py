"""Vectors on disk: one .npy file or many, read as one array; and arrays too large for memory.

The operating system reads memory-mapped arrays page by page and can drop pages from memory at any
time, so a gallery may be larger than memory. N rows, D dimensions, M vectors of an image.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile
from tokenize import TokenError

import numpy as np
import numpy.typing as npt

from cirloop.retrieval.arrays import Rows, Vectors
from cirloop.types import UserError

CHECKED_NUMBERS = 1 << 25
"""Numbers that are checked at once."""
NPY_ERRORS = (
    *(OSError, ValueError, EOFError, OverflowError),
    *(TypeError, SyntaxError, TokenError, RecursionError),
)
"""Exceptions of numpy for a file that is no array."""
MAPPED_BYTES = 1 << 30
"""Arrays of at least this size are made on disk, where there is a directory for them."""


class ConcatArray:
    """Arrays (N, D) or (N, M, D) one after the other, as one that is read by slices and by rows.

    A slice inside one part is a view of it; everything else is a copy of the rows asked for, and of
    no others.
    """

    def __init__(self, parts: Sequence[Vectors]) -> None:
        self._parts = list(parts)
        self._starts = np.cumsum([0, *map(len, parts)])
        self.dtype = parts[0].dtype
        self.ndim = parts[0].ndim
        self.shape: tuple[int, ...] = (int(self._starts[-1]), *parts[0].shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | Rows, /) -> Vectors:
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            assert step == 1, "rows are read in their order"
            cut = [part[max(0, start - at) : max(0, stop - at)] for part, at in self._with_starts()]
            pieces = [part for part in cut if len(part)] or cut[:1]
            return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        out = np.empty((*rows.shape, *self.shape[1:]), self.dtype)
        for part, at in self._with_starts():
            inside = (rows >= at) & (rows < at + len(part))
            out[inside] = part[rows[inside] - at]
        return out

    def __array__(
        self, dtype: npt.DTypeLike | None = None, copy: bool | None = None
    ) -> npt.NDArray[np.generic]:
        """Load all of it into memory, for k-means."""
        return np.asarray(self[:], dtype)

    def _with_starts(self) -> Sequence[tuple[Vectors, int]]:
        return list(zip(self._parts, self._starts[:-1].tolist(), strict=True))


def open_vectors(path: Path) -> Vectors:
    """Open memory-mapped vectors: a .npy file, or the .npy files of a directory or a pattern
    (`dir/*.npy`).

    Many files come in the order of their names, numbers in these by value. Raises UserError where
    there are none, one is no .npy array, or they do not go together.
    """
    files = files_of(path)
    parts = []
    for file in files:
        try:
            if not stat.S_ISREG(file.stat().st_mode):
                raise ValueError("it is no regular file")
            # np.load would read archives as well
            parts.append(np.lib.format.open_memmap(file, mode="r"))
        except FileNotFoundError:
            raise UserError("there is no such file") from None
        except NPY_ERRORS as error:
            where = f"{file} " if file != path else ""
            raise UserError(f"{where}is not a .npy array ({error!s:.200})") from None
        kinds = [(part.dtype, part.shape[1:]) for part in (parts[0], parts[-1])]
        if kinds[0] != kinds[1] or not parts[0].ndim:
            both = " and ".join(
                f"{name} {dtype} (N, {', '.join(map(str, shape))})"
                for name, (dtype, shape) in zip((files[0].name, file.name), kinds, strict=True)
            )
            raise UserError(f"its files do not go together: {both}")
    return parts[0] if len(parts) == 1 else ConcatArray(parts)


def validate_embeddings(vectors: Vectors, name: str) -> Vectors:
    """Return the vectors if they are finite, (N, D), or (N, M, D) where an image has several.

    Raises UserError otherwise, with the first bad row.
    """
    shaped = getattr(vectors, "ndim", 0) in (2, 3) and 0 not in vectors.shape[1:]
    if not shaped or vectors.dtype not in (np.float16, np.float32):
        kind = getattr(vectors, "dtype", type(vectors).__name__)
        raise UserError(
            f"{name} must be a float16 or float32 array of rows and dimensions, found {kind}"
            f" {getattr(vectors, 'shape', '')}. Convert numbers by .astype(numpy.float32)."
        )
    step = max(1, CHECKED_NUMBERS // int(np.prod(vectors.shape[1:], dtype=np.int64)))
    for start in range(0, len(vectors), step):
        part = np.asarray(vectors[start : start + step])
        bad = np.flatnonzero(~np.isfinite(part.reshape(len(part), -1)).all(axis=1))
        if len(bad):
            raise UserError(f"{name}: row {start + int(bad[0])} is not finite (NaN or infinity).")
    return vectors


def files_of(path: Path) -> list[Path]:
    """List the files that a path, a directory or a pattern stands for, in order. Raises UserError
    where there are none."""
    if path.is_dir():
        files = list(path.glob("*.npy"))
    elif any(sign in path.name for sign in "*?[") and not path.exists():
        files = list(path.parent.glob(path.name))
    else:
        return [path]
    if not files:
        raise UserError("has no .npy files")
    return sorted(files, key=_by_number)


def _by_number(file: Path) -> list[int | str]:
    """Return a sort key that orders the numbers in names by value."""
    parts = re.split(r"(\d+)", file.name)
    return [int(part) if part.isdecimal() else part for part in parts]


def zeros_or_memmap(shape: Sequence[int], directory: Path | None) -> npt.NDArray[np.float32]:
    """Make float32 zeros of `shape`: in memory, or from 1 GiB on in an unnamed file in `directory`
    that is freed with them."""
    if directory is None or 4 * np.prod(shape, dtype=np.int64) < MAPPED_BYTES:
        return np.zeros(tuple(shape), np.float32)
    directory.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=directory) as file:
        return np.asarray(np.memmap(file, np.float32, "w+", shape=tuple(shape)))
