"""Float32 master weights of adapters in the base's half precision (arXiv 1710.03740).

Half precision rounds away an update that is smaller than 2^-9 of a weight. So the optimizer works
on float32 copies, gradients are summed in float32 (over chunks of gradient caching and over
processes), and after each step the model's weights are the rounded copies. Step checkpoints and
adapter files hold the copies.
"""

from __future__ import annotations

from functools import partial

import torch
from accelerate import Accelerator
from torch import nn


class MasterWeights:
    """Float32 `copies` of `parameters`, which become `dtype`.

    A parameter's gradient is added to that of its copy as soon as autograd has computed it.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], dtype: torch.dtype) -> None:
        self._parameters = parameters
        self.copies = {
            name: nn.Parameter(p.detach().float().clone()) for name, p in parameters.items()
        }
        for name, parameter in parameters.items():
            parameter.data = parameter.data.to(dtype)
            parameter.register_post_accumulate_grad_hook(partial(self._move_gradient, name))

    def _move_gradient(self, name: str, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.float()
        copy = self.copies[name]
        copy.grad = gradient if copy.grad is None else copy.grad.add_(gradient)
        parameter.grad = None

    def average(self, accelerator: Accelerator) -> None:
        """Average the gradients over all processes in float32, as DDP does."""
        if accelerator.num_processes > 1:
            for name, copy in self.copies.items():
                assert copy.grad is not None, f"{name} gets no gradient"
                copy.grad = accelerator.reduce(copy.grad, "mean")

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Set the model's weights to the rounded copies."""
        for name, parameter in self._parameters.items():
            parameter.copy_(self.copies[name])
