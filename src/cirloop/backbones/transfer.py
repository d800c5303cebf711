"""Copies between the host's memory and a device, which do not make the host wait."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch

T = TypeVar("T")


def to_device(
    tensor: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Return `tensor` on `device`. To a GPU it is copied from page-locked memory, so that the host
    does not wait for the copy: what is computed from it is queued behind it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, dtype, non_blocking=True)
    return tensor.to(device, dtype)


def to_host(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Begin to copy `tensor` to the host; return what waits for it and gives it.

    From a GPU the copy stands right behind what computes the tensor: what is queued later, such as
    the next batch, is not waited for. The result has memory of its own.
    """
    if tensor.device.type != "cuda":
        return lambda: tensor.cpu().clone()
    page_locked = tensor.to("cpu", non_blocking=True)
    copied = torch.cuda.current_stream(tensor.device).record_event()

    def wait() -> torch.Tensor:
        copied.synchronize()
        return page_locked.clone()

    return wait


def one_behind(batches: Iterable[T]) -> Iterator[T]:
    """Yield each of `batches` when the next one has been made, and the last at the end.

    Where making a batch asks a GPU for results, it computes them while the host makes the next.
    """
    previous: list[T] = []
    for batch in batches:
        yield from previous
        previous = [batch]
    yield from previous
