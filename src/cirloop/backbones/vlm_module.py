"""The trained module of vision-language embedders: tensors in, embeddings out.

B rows, T tokens of a row, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from cirloop.backbones.base import Inputs, VisionLanguageModel
from cirloop.backbones.packing import attention_of, pack

MIN_MLP_ROWS = 16
"""Rows that the last MLP gets at least: products of very few rows are summed in another order, and
an embedding is not to depend on its batch."""
InputsOf = Callable[[VisionLanguageModel, Inputs], Inputs]
"""`VisionBase.language_model_inputs`."""


class VlmModule(nn.Module):
    """A vision-language model whose last token's hidden state is the embedding."""

    def __init__(self, vlm: VisionLanguageModel, inputs_of: InputsOf) -> None:
        super().__init__()
        self.vlm = vlm
        self.inputs_of = inputs_of
        self.autocast_dtype: torch.dtype | None = None
        """Dtype of computation, where some weights of the language model are float32 only."""
        self.packed = False
        """Lay rows one after another, without their padding."""
        self.skips_unread = True
        """Run the last layer's MLP on pooled tokens only: no later layer reads the others."""

    def forward(self, inputs: Inputs) -> torch.Tensor:
        """Return unit-norm embeddings (B, D), float32, of right-padded rows."""
        mask = inputs["attention_mask"]
        model_inputs = self.inputs_of(self.vlm, inputs)
        if self.packed:
            attention = attention_of(self.vlm.model.language_model)
            model_inputs = pack(model_inputs, attention)
            last = mask.sum(1).cumsum(0) - 1
        else:
            last = torch.arange(len(mask), device=mask.device) * mask.shape[1] + mask.sum(1) - 1
        mlp = self.vlm.model.language_model.layers[-1].mlp
        with only_tokens(mlp, last) if self.skips_unread else nullcontext():
            hidden = self.hidden(**model_inputs)
        return F.normalize(hidden.flatten(0, 1)[last].float(), dim=-1)

    def hidden(self, **model_inputs: Any) -> torch.Tensor:
        """Return the last hidden states (B, T, D) of the language model."""
        device = self.vlm.lm_head.weight.device.type
        dtype = self.autocast_dtype
        with torch.autocast(device, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            output = self.vlm.model.language_model(**model_inputs, use_cache=False)
        hidden: torch.Tensor = output.last_hidden_state
        return hidden


@contextmanager
def only_tokens(mlp: nn.Module, tokens: torch.Tensor) -> Iterator[None]:
    """Run an MLP on some tokens only, with zeros for the others.

    `tokens` (N,) count through all rows of its input (B, T, D).
    """
    num_fillers = max(0, MIN_MLP_ROWS - len(tokens))
    shape = torch.Size()

    def choose(_: nn.Module, args: tuple[torch.Tensor]) -> torch.Tensor:
        nonlocal shape
        shape = args[0].shape
        return F.pad(args[0].flatten(0, 1)[tokens], (0, 0, 0, num_fillers))[None]

    def put_back(_: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        empty = output.new_zeros(shape[0] * shape[1], shape[2])
        return empty.index_copy(0, tokens, output[0, : len(tokens)]).view(shape)

    hooks = mlp.register_forward_pre_hook(choose), mlp.register_forward_hook(put_back)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
