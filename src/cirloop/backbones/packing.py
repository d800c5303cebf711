"""Rows of a batch laid one after another in one row without padding, each seeing only itself.

All but attention works on each token by itself and needs nothing more than the tokens. Attention is
told where rows begin: flash attention by `cu_seq_lens`; eager attention by the positions of the
text, from which transformers makes a mask (where they are given as a fourth row beside M-RoPE's
three, without any mask; else rows leak into each other). For sdpa that mask would be (L, L), and
its attention quadratic in the whole batch. Here sdpa therefore gets its rows back, padded on the
right, for which being causal is mask enough: no token sees what is to its right.

B rows, T tokens of the longest, L tokens of all, H heads, D dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from cirloop.types import UserError

Inputs = dict[str, Any]
SDPA = "sdpa_of_packed_rows"
"""transformers' name for sdpa that also takes packed rows; without them it is sdpa."""
LANGUAGE_MODELS = ("llama", "mistral", "qwen2", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text")
"""Whose forward passes have been read: what is told of rows reaches attention, and nothing else
mixes tokens."""


def check_packing(directory: str) -> None:
    """Raises UserError where the language model of `directory` is none that rows can be packed
    for."""
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


def let_sdpa_take_rows(language_model: Any) -> None:
    if language_model.config._attn_implementation == "sdpa":
        language_model.set_attn_implementation(SDPA)


def pack(placed: Inputs, attention: str) -> Inputs:
    """What a language model with `attention` is called with, in one row (1, L), for right-padded
    rows (B, T)."""
    mask_BT = placed["attention_mask"].bool()
    longest = mask_BT.shape[1]
    places_L = mask_BT.flatten().nonzero().squeeze(1)
    text_L = places_L % longest
    packed = {
        **placed,
        "inputs_embeds": placed["inputs_embeds"].flatten(0, 1)[places_L][None],
        "attention_mask": None,
        "position_ids": text_L[None],
    }
    if "position_ids" in placed:  # M-RoPE's three rows
        packed["position_ids"] = torch.cat(
            [text_L[None], placed["position_ids"].flatten(1)[:, places_L]]
        )[:, None]
    if "visual_pos_masks" in placed:
        packed["visual_pos_masks"] = placed["visual_pos_masks"].flatten()[places_L][None]
    if attention == SDPA:
        # transformers hands a mask of four dimensions on as it is, and makes none: this one is not
        # looked at
        sign = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=mask_BT.device)
        return {**packed, "attention_mask": sign, "packed_mask": mask_BT, "packed_places": places_L}
    if attention == "flash_attention_2":
        starts = F.pad(mask_BT.sum(1).cumsum(0), (1, 0)).int()
        ends = {
            "cu_seq_lens_q": starts,
            "cu_seq_lens_k": starts,
            "max_length_q": longest,
            "max_length_k": longest,
        }
        return {**packed, **ends}
    assert attention == "eager", attention
    return packed


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    packed_mask: torch.Tensor | None = None,
    packed_places: torch.Tensor | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' sdpa, (1, H, L, D) to (1, L, H, D), of the rows that `packed_mask` (B, T) and
    `packed_places` (L) describe; without them as it is."""
    if packed_mask is None or packed_places is None:
        out: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **more
        )
        return out
    query, key, value = (
        _padded(states, packed_mask, packed_places) for states in (query, key, value)
    )
    out_BTHD, _ = sdpa_attention_forward(module, query, key, value, None, **more)
    return out_BTHD.flatten(0, 1)[packed_places][None], None


def _padded(states: torch.Tensor, mask_BT: torch.Tensor, places_L: torch.Tensor) -> torch.Tensor:
    """(1, H, L, D) to (B, H, T, D)."""
    states_LHD = states[0].transpose(0, 1)
    empty = states_LHD.new_zeros(mask_BT.numel(), *states_LHD.shape[1:])
    padded: torch.Tensor = empty.index_copy(0, places_L, states_LHD).unflatten(0, mask_BT.shape)
    return padded.transpose(1, 2)


AttentionInterface.register(SDPA, attend)
AttentionMaskInterface.register(SDPA, sdpa_mask)
