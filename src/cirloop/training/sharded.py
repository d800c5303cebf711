"""Weights that lie in pieces on several processes (DeepSpeed ZeRO-3, FSDP2), as whole tensors, and
the way back.

Every process of the stage calls these together: gathering is a collective.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


class AllGatherWithGrad(torch.autograd.Function):
    """Rows of all P processes (B, P, D) from each one's (B, D). Every process computes a loss of
    all rows, and a row's gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, local_BD: torch.Tensor) -> torch.Tensor:
        local_BD = local_BD.contiguous()
        parts = [torch.empty_like(local_BD) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, local_BD)
        return torch.stack(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        grad_BPD = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad_BPD)
        return grad_BPD[:, dist.get_rank()]


def gather_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that FSDP2 keeps in pieces, whole; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A copy of a whole `value`, where and in such pieces as `parameter` lies."""
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value.clone()


def gather_parameters(parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Whole copies of the weights, on the CPU."""
    pieces = [p for p in parameters.values() if hasattr(p, "ds_id")]  # ZeRO-3's mark
    context: Any = nullcontext()
    if pieces:
        from deepspeed.runtime.zero import GatheredParameters

        context = GatheredParameters(pieces)
    with context:
        return {
            name: gather_tensor(p.detach()).cpu().clone().contiguous()
            for name, p in parameters.items()
        }


def unsharded(parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Those of the weights that lie in pieces, whole, on the CPU."""
    pieces = {n: p for n, p in parameters.items() if isinstance(p, DTensor) or hasattr(p, "ds_id")}
    return {name: nn.Parameter(value) for name, value in gather_parameters(pieces).items()}


def reshard_all(module: nn.Module) -> None:
    """FSDP2 keeps some weights gathered after a forward pass, and reading the state of one process
    alone would cut them there alone: the next collective would not fit. So all cut them."""
    for each in module.modules():
        if isinstance(each, FSDPModule):
            each.reshard()


@contextmanager
def replaced(core: nn.Module, parameters: dict[str, nn.Parameter]) -> Iterator[None]:
    """Within, `parameters` stand in `core` in the place of its own."""
    own = {name: core.get_parameter(name) for name in parameters}
    try:
        _put(core, parameters)
        yield
    finally:
        _put(core, own)


def _put(core: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        module, _, leaf = name.rpartition(".")
        core.get_submodule(module)._parameters[leaf] = parameter
