"""Memory, disk and operations by arithmetic, from the sizes in a model's config.json;
`benchmarks/plan_against_measured.py` holds it against what a model really takes.

Names of sizes: D hidden, F intermediate, Q and K the widths of all queries and of all keys of a
layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from cirloop.backbones.weights import unloadable
from cirloop.types import UserError

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
NF4_BYTES = 0.516
"""Of a weight in 4 bits with a scale in 8 bits for every 64 of them (QLoRA, arXiv 2305.14314)."""
INPUTS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""Linear layers of a decoder layer that have the same input."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of a vision-language model, by its config.json."""

    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_heads: int
    head_width: int
    language_weights: int
    """Of the language model without what is embedded; a head that is not tied to the embedding is
    there."""
    embedding_weights: int
    vision_weights: int
    vision_width: int
    """Numbers kept of an image per token of it, DeepStack's among them."""
    pixels_per_token: int
    """Side of the square of pixels that makes a token, for Qwen's families; else 0."""
    vision_layers: int
    vision_hidden: int
    patches_per_token: int
    """Patches of the tower that are merged into a token."""

    @property
    def weights(self) -> int:
        return self.language_weights + self.embedding_weights + self.vision_weights

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Return the inputs and outputs of each linear layer of a decoder layer."""
        queries = self.heads * self.head_width
        keys = self.key_heads * self.head_width
        return {
            "q_proj": (self.hidden, queries),
            "k_proj": (self.hidden, keys),
            "v_proj": (self.hidden, keys),
            "o_proj": (queries, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }


@cache
def model_sizes(directory: Path) -> Sizes:
    """Return the sizes of the model in a directory, of which only config.json is read.

    Raises UserError for a config.json of no model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    not_buildable: tuple[type[Exception], ...] = (*unloadable(), RuntimeError)
    try:
        config: Any = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        with torch.device("meta"):
            model: Any = AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
    except not_buildable as error:
        raise UserError(
            f"{directory / 'config.json'} is of no model that can be built:"
            f" {type(error).__name__}: {error}\nRestore it, or give the config.json of the weights."
        ) from None
    text = config.text_config
    vision = config.vision_config
    total = sum(parameter.numel() for parameter in model.parameters())
    embedding = model.get_input_embeddings().weight.numel()
    language = sum(parameter.numel() for parameter in model.model.language_model.parameters())
    head = 0 if model.config.tie_word_embeddings else model.lm_head.weight.numel()
    deep = len(getattr(vision, "deepstack_visual_indexes", None) or ())
    merged = getattr(vision, "spatial_merge_size", 0)
    heads = text.num_attention_heads
    return Sizes(
        config.model_type,
        text.hidden_size,
        text.intermediate_size,
        text.num_hidden_layers,
        heads,
        text.num_key_value_heads or heads,
        getattr(text, "head_dim", None) or text.hidden_size // heads,
        language - embedding + head,
        embedding,
        total - language - head,
        text.hidden_size * (1 + deep),
        vision.patch_size * merged,
        getattr(vision, "depth", None) or vision.num_hidden_layers,
        getattr(vision, "embed_dim", None) or vision.hidden_size,
        max(1, merged) ** 2,
    )


def weight_bytes(sizes: Sizes, dtype: str, quantization: str = "none") -> int:
    """Return the bytes of all weights of the base model."""
    linear = NF4_BYTES if quantization == "nf4" else BYTES[dtype]
    rest = sizes.embedding_weights + sizes.vision_weights
    return round(sizes.language_weights * linear) + rest * BYTES[dtype]


def adapter_weights(sizes: Sizes, rank: int, targets: Sequence[str], dora: bool = False) -> int:
    """Count the weights of a LoRA of this `rank`; a DoRA has a magnitude per output too."""
    layer = 0
    for name in {*targets} & sizes.shapes.keys():
        inputs, outputs = sizes.shapes[name]
        layer += rank * (inputs + outputs) + outputs * dora
    return sizes.layers * layer


def trained_bytes(weights: int, copies_of: int = 0) -> int:
    """Return the bytes of trained float32 weights, their gradients and AdamW's two moments.

    `copies_of` are the bytes of the weights that the float32 ones are copies of.
    """
    return weights * (4 + 4 + 8 + copies_of)


def activation_bytes(
    sizes: Sizes,
    dtype: str,
    adapter_dtype: str,
    rank: int,
    targets: Sequence[str],
    dropout: float,
    padded: bool = True,
    eager_tokens: int = 0,
    on_cpu: bool = False,
) -> int:
    """Per token of a row, what autograd keeps of a decoder for LoRAs around a frozen base.

    A layer keeps: the float32 input of its two norms; queries, keys, values (of all heads, where a
    mask is given) and the output of attention; gate, its activation and up of the MLP; per adapter
    its input after dropout, what dropout left (a byte on a GPU, a number on a CPU) and the `rank`
    numbers between its factors. Frozen linear layers keep nothing. `eager_tokens`: a row's, where
    attention keeps all its weights.
    """
    base = BYTES[dtype]
    adapter = BYTES[adapter_dtype]
    queries = sizes.heads * sizes.head_width
    keys = sizes.key_heads * sizes.head_width
    attention = base * (2 * queries + 2 * (queries if padded else keys))
    attention += sizes.heads * eager_tokens * (4 + base)
    layer = 2 * 4 * sizes.hidden + attention + 3 * base * sizes.intermediate
    for names in INPUTS:
        used = [name for name in names if name in targets]
        inputs = sizes.shapes[names[0]][0]
        if dropout:
            layer += len(used) * inputs * (adapter + (adapter if on_cpu else 1))
        elif used:
            layer += inputs * adapter * (1 if base == adapter else len(used))
        layer += len(used) * rank * adapter
    return sizes.layers * layer


def checkpointed_bytes(sizes: Sizes, dtype: str, per_token: int) -> int:
    """Return the bytes per token with gradient checkpointing: every layer's input, and all of one
    layer."""
    return sizes.layers * sizes.hidden * BYTES[dtype] + per_token // sizes.layers


def working_bytes(sizes: Sizes, dtype: str, adapter_dtype: str = "") -> int:
    """Return the bytes per token that the MLP, the largest part of a layer, holds beside what
    autograd keeps."""
    adapter = BYTES.get(adapter_dtype, 0)
    return (
        3 * sizes.intermediate * BYTES[dtype]
        + 2 * sizes.intermediate * adapter
        + 4 * sizes.hidden * 4
    )


def key_value_bytes(sizes: Sizes, dtype: str) -> int:
    """Return the bytes per token of the keys and values of all layers."""
    return 2 * sizes.layers * sizes.key_heads * sizes.head_width * BYTES[dtype]


def caption_bytes(sizes: Sizes, dtype: str, questions: int, tokens: int, new_tokens: int) -> int:
    """Return the bytes of a batch's keys and values: as prefilled, and once more with room for the
    answer."""
    return questions * (2 * tokens + new_tokens) * key_value_bytes(sizes, dtype)


def vision_flops(sizes: Sizes, tokens: float) -> float:
    """Return the operations of the tower for an image of `tokens` tokens."""
    patches = sizes.patches_per_token * tokens
    attention = 4 * sizes.vision_layers * sizes.vision_hidden * patches**2
    return 2 * sizes.vision_weights * patches + attention


def language_flops(sizes: Sizes, tokens: float, before: float = 0.0) -> float:
    """Return the operations of a forward pass over `tokens` tokens of a row, behind `before` others
    that have been read."""
    pairs = tokens * (before + tokens / 2)
    attention = 4 * sizes.layers * sizes.heads * sizes.head_width * pairs
    return 2 * sizes.language_weights * tokens + attention


def feature_bytes(sizes: Sizes, dtype: str, tokens: float) -> int:
    """Return the bytes of an image's vision features on disk."""
    return round(tokens * sizes.vision_width * BYTES[dtype])


def gigabytes(num_bytes: float) -> str:
    """Format a number of bytes in units of 10^9 bytes."""
    return f"{num_bytes / 1e9:,.0f} GB" if num_bytes >= 1e11 else f"{num_bytes / 1e9:.3g} GB"
