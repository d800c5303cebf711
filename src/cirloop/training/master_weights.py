"""Adapters in the base's half precision, trained through float32 copies (mixed precision, arXiv
1710.03740).

Half precision rounds away an update that is smaller than 2^-9 of a weight. So the optimizer works
on float32 copies, gradients are summed up in float32 (over chunks of gradient caching and over
processes), and after each step the model's weights are the copies, rounded. Copies are what step
checkpoints and adapter files hold.
"""

from __future__ import annotations

from functools import partial

import torch
from accelerate import Accelerator
from torch import nn


class Masters:
    """Float32 `copies` of `parameters`, which become `dtype`. A parameter's gradient is moved to
    its copy as soon as autograd has made it, and added to what is there."""

    def __init__(self, parameters: dict[str, nn.Parameter], dtype: torch.dtype) -> None:
        self._parameters = parameters
        self.copies = {
            name: nn.Parameter(p.detach().float().clone()) for name, p in parameters.items()
        }
        for name, parameter in parameters.items():
            parameter.data = parameter.data.to(dtype)
            parameter.register_post_accumulate_grad_hook(partial(self._take, name))

    def _take(self, name: str, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        gradient, copy = parameter.grad.float(), self.copies[name]
        copy.grad = gradient if copy.grad is None else copy.grad.add_(gradient)
        parameter.grad = None

    def average(self, accelerator: Accelerator) -> None:
        """Make the gradients their mean over all processes, as DDP does, in float32."""
        if accelerator.num_processes > 1:
            for name, copy in self.copies.items():
                assert copy.grad is not None, f"{name} gets no gradient"
                copy.grad = accelerator.reduce(copy.grad, "mean")

    @torch.no_grad()
    def round(self) -> None:
        """Set the model's weights to the copies, rounded."""
        for name, parameter in self._parameters.items():
            parameter.copy_(self.copies[name])
