"""Dropout of some rows of a batch as it is drawn for all of them.

A batch that memory does not hold is done in pieces. Each piece draws every dropout for the whole batch, from the state
of the random numbers that the whole batch would have had, and takes its own rows of it: the pieces then drop out what
the batch in one would have. Only the draw is as large as the batch, and only while it lasts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from cirloop.backbones.proof import uncompiled
from cirloop.types import UserError

CANNOT = (
    "memory does not suffice for a training step, and it cannot be done in pieces: {}. Set training.chunk_size, or a "
    "smaller training.batch_size."
)


@dataclass(frozen=True, slots=True)
class Window:
    """Places `first` to `first + count` of `total`, along `dim` of what drops out."""

    first: int
    count: int
    total: int
    dim: int = 0


@contextmanager
def drawn_for(window: Window) -> Iterator[None]:
    """Within, dropout is that of a window of more rows. Raises UserError where attention itself drops out, or what
    drops out does not have the window's rows.

    torch's functions have stand-ins meanwhile, in all threads: checkpointed layers run again in those of autograd,
    which see no torch function mode.
    """
    real, attention = F.dropout, F.scaled_dot_product_attention
    w = window

    def dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        if not training or p == 0:
            return input
        if input.shape[w.dim] != w.count:
            raise UserError(CANNOT.format(f"what drops out in it has the shape {tuple(input.shape)}"))
        shape = list(input.shape)
        shape[w.dim] = w.total
        kept = real(torch.ones(shape, dtype=input.dtype, device=input.device), p)
        return input * kept.narrow(w.dim, w.first, w.count)

    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0, *rest: Any, **more: Any,
    ) -> torch.Tensor:  # fmt: skip
        if dropout_p:
            raise UserError(CANNOT.format("attention itself drops out"))
        return attention(query, key, value, attn_mask, dropout_p, *rest, **more)

    F.dropout, F.scaled_dot_product_attention = dropout, attend
    try:
        with uncompiled():
            yield
    finally:
        F.dropout, F.scaled_dot_product_attention = real, attention


def random_state(device: torch.device) -> Callable[[], None]:
    """What brings back the random numbers of the CPU and of `device` as they are now."""
    cpu, module = torch.get_rng_state(), torch.get_device_module(device)
    other = None if device.type == "cpu" else module.get_rng_state(device)

    def bring_back() -> None:
        torch.set_rng_state(cpu)
        if other is not None:
            module.set_rng_state(other, device)

    return bring_back
