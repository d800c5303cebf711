"""Floating-point operations (FLOPs) of a model by formula, from the sizes of its layers, and a device's limit.

A multiplication and an addition are 2. A token costs 2 per weight of the linear layers it passes, and attention over n
tokens 4 * width * n^2 per layer, half of that under a causal mask. Norms, activations and look-ups are left out, as in
the usual counts (PaLM, arXiv 2204.02311, appendix B), and so is padding, which models do compute.

Backward: a weight that is trained needs two products of the size of the forward's, for its own gradient and for its
input's; a frozen one (LoRA) only the latter; attention always both. So training costs 3 forward passes in what is
trained and in attention, and 2 in frozen layers. Gradient caching and gradient checkpointing add a forward pass each.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from cirloop import cost

QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""Families whose vision tower takes patches in any number, all in one attention or in windows of known size."""


@dataclass(frozen=True, slots=True)
class Flops:
    """Of a forward pass over a sequence of n: linear * n + square * n^2, and `head` for each next token's scores."""

    kind: str
    """Device and type, such as "cuda bfloat16"."""
    linear: float
    square: float
    trained: float = 0.0
    """The part of `linear` whose weights are trained."""
    head: float = 0.0

    def forward(self, lengths: Iterable[int]) -> float:
        return sum(self.linear * n + self.square * n * n for n in lengths)

    def backward(self, lengths: Iterable[int]) -> float:
        return sum((self.linear + self.trained) * n + 2 * self.square * n * n for n in lengths)


def language(encoder: Any, adapters: bool = True) -> Flops | None:
    """Per token of a row, of the language model of an embedder or captioner, with its LoRA or without. None where the
    formula does not hold: no `vlm`, or attention that does not see the whole row.
    """
    vlm = getattr(encoder, "vlm", None)
    if vlm is None or any(kind != "full_attention" for kind in getattr(vlm.config.text_config, "layer_types", ())):
        return None
    text, model = vlm.config.text_config, vlm.model.language_model
    width = text.num_attention_heads * (getattr(text, "head_dim", 0) or text.hidden_size // text.num_attention_heads)
    linear, trained = _weights(model, adapters)
    head = 2.0 * text.hidden_size * text.vocab_size
    return Flops(_kind(vlm), 2 * linear, 2 * text.num_hidden_layers * width, 2 * trained, head)


def vision(encoder: Any) -> Flops | None:
    """Per patch of an image, of the vision tower. None for other families than Qwen's: what they make of an image
    (crops, tiles) does not follow from its grid.

    Qwen2.5-VL's windows count as full; those at an image's edges are smaller.
    """
    vlm = getattr(encoder, "vlm", None)
    if vlm is None or vlm.config.model_type not in QWEN:
        return None
    config, tower = vlm.config.vision_config, vlm.model.visual
    mergers = [part for name, part in tower.named_children() if "merger" in name]
    merged, patches = sum(_weights(part)[0] for part in mergers), config.spatial_merge_size**2
    linear = 2 * (_weights(tower)[0] - merged) + 2 * merged / patches
    pairs, windowed = 4.0 * tower.blocks[0].attn.qkv.in_features, 0
    if vlm.config.model_type == "qwen2_5_vl":
        windowed = len(tower.blocks) - len(config.fullatt_block_indexes)
        linear += windowed * pairs * (config.window_size // config.patch_size) ** 2
    return Flops(_kind(vlm), linear, (len(tower.blocks) - windowed) * pairs)


def _weights(module: nn.Module, adapters: bool = True) -> tuple[int, int]:
    """Weights of the linear layers, of convolutions that see each input once too; and how many of them are trained.

    By the layers' sizes: the weights themselves may be packed (4 bits) or lie in pieces on several processes.
    """
    num = trained = 0
    for name, each in module.named_modules():
        if isinstance(each, nn.Linear):
            size = each.in_features * each.out_features
        elif isinstance(each, nn.Conv3d):
            size = each.weight.numel()
        else:
            continue
        if adapters or ".lora_" not in name:
            num, trained = num + size, trained + size * each.weight.requires_grad
    return num, trained


def _kind(vlm: Any) -> str:
    return f"{vlm.device.type} {str(vlm.dtype).removeprefix('torch.')}"


def count(flops: Flops | None, inputs: dict[str, Any], backward: bool = False, again: int = 0) -> tuple[int, int]:
    """Note what a call of an embedder costs, forward and `backward`, `again` the forward passes beside the one.

    Returns the tokens of its rows and the places that are padding; 0 for a model whose inputs have no mask.
    """
    mask = inputs.get("attention_mask")
    lengths = mask.sum(1).tolist() if mask is not None else []
    tokens, padding = sum(lengths), mask.numel() - sum(lengths) if mask is not None else 0
    cost.add(tokens=tokens, padding=padding, flops_unknown=flops is None)
    if flops is not None:
        total = (1 + again) * flops.forward(lengths) + (flops.backward(lengths) if backward else 0.0)
        cost.add_flops(flops.kind, total)
    return tokens, padding


def count_images(flops: Flops | None, grids: Iterable[tuple[int, int, int]]) -> None:
    """Note images that went through the tower, by their patch grids; each of an image's frames is by itself."""
    frames = [height * width for num, height, width in grids for _ in range(num)]
    cost.add(flops_unknown=flops is None)
    if flops is not None:
        cost.add_flops(flops.kind, flops.forward(frames))


def count_answers(flops: Flops | None, mask_BT: torch.Tensor, written_BN: torch.Tensor | None, pad: Any) -> None:
    """Note questions (mask_BT of their tokens) and the tokens of their answers; None: one was scored, none written.

    Cached keys and values make an answer as dear as one pass over question and answer, its last token left out.
    """
    asked = mask_BT.sum(1)
    written = torch.ones_like(asked) if written_BN is None else written_BN.ne(pad).sum(1)
    lengths, num = (asked + written - 1).tolist(), int(written.sum())
    cost.add(tokens=int(asked.sum()), padding=mask_BT.numel() - int(asked.sum()), flops_unknown=flops is None)
    cost.add(tokens_written=0 if written_BN is None else num)
    if flops is not None:
        cost.add_flops(flops.kind, flops.forward(lengths) + num * flops.head)


def count_read(flops: Flops | None, before: Sequence[int], after: Sequence[int], places: int) -> None:
    """Note rows that were read from `before` tokens on to `after`, the keys and values of the first kept; in so many
    places, padding among them."""
    tokens = sum(after) - sum(before)
    cost.add(tokens=tokens, padding=places - tokens, flops_unknown=flops is None)
    if flops is not None:
        cost.add_flops(flops.kind, flops.forward(after) - flops.forward(before))


def count_written(flops: Flops | None, asked: Sequence[int], written: Sequence[int]) -> None:
    """Note answers of `written` tokens to questions of `asked` tokens, which were read but for the last token."""
    cost.add(tokens_written=sum(written))
    if flops is not None:
        after = [a + w - 1 for a, w in zip(asked, written, strict=True)]
        spent = flops.forward(after) - flops.forward(a - 1 for a in asked)
        cost.add_flops(flops.kind, spent + sum(written) * flops.head)


def count_scored(flops: Flops | None, num: int) -> None:
    """Note the scores of the next token for `num` rows that were read."""
    if flops is not None:
        cost.add_flops(flops.kind, num * flops.head)


@cache
def limit(kind: str, seconds: float = 0.2) -> float:
    """FLOP/s that one device reaches in `kind`: the best of some products of square matrices, measured now."""
    device, dtype = kind.split()
    size = 8192 if device == "cuda" else 1024
    a = torch.randn(size, size, device=device).to(getattr(torch, dtype))

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    best, until = float("inf"), 0.0
    while not until or time.perf_counter() < until:
        wait()
        began = time.perf_counter()
        torch.mm(a, a)
        wait()
        if until:  # the first is for warming up
            best = min(best, time.perf_counter() - began)
        until = until or time.perf_counter() + seconds
    del a
    if device == "cuda":
        torch.cuda.empty_cache()
    return 2 * size**3 / best
