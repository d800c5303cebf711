"""Copies from the host's memory to a device."""

from __future__ import annotations

import torch


def to_device(
    tensor: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Return `tensor` on `device`. To a GPU it is copied from page-locked memory, so that the host
    does not wait for the copy: what is computed from it is queued behind it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, dtype, non_blocking=True)
    return tensor.to(device, dtype)
