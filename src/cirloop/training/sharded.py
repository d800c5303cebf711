"""Gathering and resharding of weights that DeepSpeed ZeRO-3 or FSDP2 shard over processes.

Every process of the stage calls these functions together: gathering is a collective.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import FunctionCtx
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


class AllGatherWithGrad(torch.autograd.Function):
    """Gathers the rows (B, D) of all P processes as (B, P, D), with gradients.

    Every process computes a loss of all rows; a row's gradient is the sum over processes.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, local_BD: torch.Tensor) -> torch.Tensor:
        """Gather rows."""
        local_BD = local_BD.contiguous()
        parts = [torch.empty_like(local_BD) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, local_BD)
        return torch.stack(parts, dim=1)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: torch.Tensor) -> torch.Tensor:
        """Sum the gradients of this process's rows."""
        grad_BPD = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad_BPD)
        return grad_BPD[:, dist.get_rank()]


def gather_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return the full tensor of one that FSDP2 shards; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Copy a full `value` to the device of `parameter`, sharded as `parameter` is."""
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value.clone()


def gather_parameters(parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Return full copies of the weights, on the CPU."""
    with _whole(parameters):
        return {
            name: gather_tensor(p.detach()).cpu().clone().contiguous()
            for name, p in parameters.items()
        }


@torch.no_grad()
def set_parameters(parameters: dict[str, nn.Parameter], values: dict[str, torch.Tensor]) -> None:
    """Set weights to full `values`, which every process has."""
    with _whole(parameters, writer=0):
        for name, parameter in parameters.items():
            parameter.copy_(shard_like(values[name], parameter))


def _whole(
    parameters: dict[str, nn.Parameter], writer: int | None = None
) -> AbstractContextManager[object]:
    """Gather what ZeRO-3 shards while the context is open; what process `writer` has made of it is
    then cut again."""
    sharded = [p for p in parameters.values() if hasattr(p, "ds_id")]  # ZeRO-3's mark
    if not sharded:
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    context: AbstractContextManager[object] = GatheredParameters(sharded, modifier_rank=writer)
    return context


def unsharded(parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Return full copies of those weights that are sharded, on the CPU."""
    sharded = {n: p for n, p in parameters.items() if isinstance(p, DTensor) or hasattr(p, "ds_id")}
    return {name: nn.Parameter(value) for name, value in gather_parameters(sharded).items()}


def reshard_all(module: nn.Module) -> None:
    """Reshard all modules on every rank before state is read.

    FSDP2 may leave parameters unsharded after forward; resharding on one rank only would
    desynchronise the next collective.
    """
    for submodule in module.modules():
        if isinstance(submodule, FSDPModule):
            submodule.reshard()


@contextmanager
def replaced(root: nn.Module, parameters: dict[str, nn.Parameter]) -> Iterator[None]:
    """Put `parameters` into `root` in the place of its own, and restore those afterwards."""
    own = {name: root.get_parameter(name) for name in parameters}
    try:
        _put(root, parameters)
        yield
    finally:
        _put(root, own)


def _put(root: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        module, _, leaf = name.rpartition(".")
        root.get_submodule(module).register_parameter(leaf, parameter)
