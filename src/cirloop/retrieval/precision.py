"""Products of float32 matrices in float32, whatever the process has allowed for speed.

`torch.set_float32_matmul_precision("high")` and `torch.backends.cuda.matmul.allow_tf32 = True` let
a product round its factors to 10 bits (TF32). The bounds that make a search exact hold for 23.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

EXACT = ("ieee", "none")
"""Values of torch's `fp32_precision` that round nothing; `none` is a backend that nobody has
set."""
_lock = threading.Lock()
_held: list[tuple[str, ...]] = []
"""What was allowed before, once for each search that is going on."""


@contextmanager
def float32_products() -> Iterator[None]:
    """Make products in float32 within, and allow at the end what was allowed before.

    The setting is the process's: of searches in several threads the first changes it, and the last
    puts it back.
    """
    with _lock:
        _held.append(_held[0] if _held else _allowed())
        if not _is_exact(_held[0]):
            torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        with _lock:
            before = _held.pop()
            if not _held and not _is_exact(before):
                _allow(before)


def _backends() -> tuple[Any, ...]:
    backends: Any = torch.backends  # typed in part
    return backends.cuda.matmul, backends.mkldnn.matmul


def _is_exact(allowed: tuple[str, ...]) -> bool:
    return all(precision in EXACT for precision in allowed[1:])


def _allowed() -> tuple[str, ...]:
    """Return the precision by torch's older function, and then that of each backend.

    The first is empty where the two disagree, about which the older function raises an error.
    """
    try:
        overall = torch.get_float32_matmul_precision()
    except RuntimeError:
        overall = ""
    return (overall, *(str(backend.fp32_precision) for backend in _backends()))


def _allow(allowed: tuple[str, ...]) -> None:
    overall, *by_backend = allowed
    if overall:
        torch.set_float32_matmul_precision(overall)
    for backend, precision in zip(_backends(), by_backend, strict=True):
        backend.fp32_precision = precision
