"""Packing: rows of a batch one after another in one row without padding, each seeing only itself.

All layers but attention work on each token by itself and need only the tokens. Attention must know
where rows begin. Flash attention knows it from `cu_seq_lens`. Eager attention knows it from the
positions of the text, from which transformers makes a mask (if they are a fourth row beside
M-RoPE's three and no mask is passed; otherwise rows leak into each other). For sdpa that mask would
be (L, L), and its attention quadratic in the whole batch. Here sdpa therefore gets its rows back,
padded on the right, for which the causal mask suffices: no token sees what is to its right.

B rows, T tokens of the longest, L tokens of all, H heads, D dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from cirloop.backbones.base import Inputs
from cirloop.types import UserError

SDPA = "sdpa_of_packed_rows"
"""Name in transformers of an sdpa that also takes packed rows; without them it is sdpa."""
LANGUAGE_MODELS = ("llama", "mistral", "qwen2", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text")
"""Types of language models whose forward passes were read: what describes rows reaches attention,
and nothing else mixes tokens."""


def check_packing(directory: str) -> None:
    """Raise UserError where rows cannot be packed for the language model of `directory`."""
    text = AutoConfig.from_pretrained(directory, trust_remote_code=False).get_text_config()
    if text.model_type not in LANGUAGE_MODELS:
        raise UserError(
            f"model.packed: the language model is of type {text.model_type!r}; rows can be packed"
            f" for {', '.join(LANGUAGE_MODELS)}. Set model.packed false."
        )
    windows = "sliding_attention" in (getattr(text, "layer_types", None) or ())
    if windows or (text.model_type == "mistral" and text.sliding_window is not None):
        raise UserError(
            f"model.packed: layers of the language model see a window of {text.sliding_window}"
            " tokens, which packed rows do not have. Set model.packed false."
        )


def attention_of(model: PreTrainedModel) -> str:
    """Return the name of the attention implementation of a language model or vision tower."""
    implementation: str = model.config._attn_implementation  # no public name
    return implementation


def install_packed_sdpa(language_model: PreTrainedModel) -> None:
    """Replace a language model's sdpa by the one that takes packed rows."""
    if attention_of(language_model) == "sdpa":
        language_model.set_attn_implementation(SDPA)


def pack(inputs: Inputs, attention: str) -> Inputs:
    """Pack right-padded rows (B, T) of a language model's inputs into one row (1, L)."""
    mask_BT = inputs["attention_mask"].bool()
    longest = mask_BT.shape[1]
    tokens_L = mask_BT.flatten().nonzero().squeeze(1)
    text_L = tokens_L % longest
    packed = {
        **inputs,
        "inputs_embeds": inputs["inputs_embeds"].flatten(0, 1)[tokens_L][None],
        "attention_mask": None,
        "position_ids": text_L[None],
    }
    if "position_ids" in inputs:  # M-RoPE's three rows
        mrope_3L = inputs["position_ids"].flatten(1)[:, tokens_L]
        packed["position_ids"] = torch.cat([text_L[None], mrope_3L])[:, None]
    if "visual_pos_masks" in inputs:
        packed["visual_pos_masks"] = inputs["visual_pos_masks"].flatten()[tokens_L][None]
    if attention == SDPA:
        # transformers passes a mask of four dimensions on and makes none. This one is not read.
        mark = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=mask_BT.device)
        return {**packed, "attention_mask": mark, "packed_mask": mask_BT, "packed_tokens": tokens_L}
    if attention == "flash_attention_2":
        starts = F.pad(mask_BT.sum(1).cumsum(0), (1, 0)).int()
        boundaries = {
            "cu_seq_lens_q": starts,
            "cu_seq_lens_k": starts,
            "max_length_q": longest,
            "max_length_k": longest,
        }
        return {**packed, **boundaries}
    assert attention == "eager", attention
    return packed


def packed_sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    packed_mask: torch.Tensor | None = None,
    packed_tokens: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Run transformers' sdpa, (1, H, L, D) to (1, L, H, D), on packed rows.

    `packed_mask` (B, T) and `packed_tokens` (L) describe the rows; without them it is plain sdpa.
    """
    if packed_mask is None or packed_tokens is None:
        output: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **kwargs
        )
        return output
    query, key, value = (
        _padded(states, packed_mask, packed_tokens) for states in (query, key, value)
    )
    out_BTHD, _ = sdpa_attention_forward(module, query, key, value, None, **kwargs)
    return out_BTHD.flatten(0, 1)[packed_tokens][None], None


def _padded(states: torch.Tensor, mask_BT: torch.Tensor, tokens_L: torch.Tensor) -> torch.Tensor:
    """Unpack states (1, H, L, D) to padded rows (B, H, T, D)."""
    states_LHD = states[0].transpose(0, 1)
    empty = states_LHD.new_zeros(mask_BT.numel(), *states_LHD.shape[1:])
    padded: torch.Tensor = empty.index_copy(0, tokens_L, states_LHD).unflatten(0, mask_BT.shape)
    return padded.transpose(1, 2)


AttentionInterface.register(SDPA, packed_sdpa)
AttentionMaskInterface.register(SDPA, sdpa_mask)
