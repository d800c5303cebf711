"""Prefill of prompts by the language model, with common prefixes read only once.

A conversation is cut where its second image begins and where that image ends. Rows that are equal
up to a cut, in images and tokens, are one row until there; its keys and values are then repeated
for all rows that continue from it. So a reference image is read once for all its mined images, and
a pair of images once for all texts about it.

B rows, T columns, U rows that differ up to a cut, D dimensions.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from cirloop.backbones.base import ImageFeatures, Inputs
from cirloop.backbones.transfer import to_device
from cirloop.backbones.vision import VisionBase
from cirloop.captioning.base import CaptionRequest
from cirloop.monitoring import profiling

KeysValues = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class PrefillState:
    """Rows that the language model has read.

    Padding stands to the left of each prefix group's tokens, so also inside a row that was read in
    several groups.
    """

    ids_BT: torch.Tensor
    mask_BT: torch.Tensor
    positions_3BT: torch.Tensor
    """Positions of M-RoPE: those that the row has when it is read at once."""
    past: list[KeysValues]
    """Keys and values (B, heads, T, width) of each layer."""
    last_BD: torch.Tensor
    """Hidden state of the last token."""


@dataclass(frozen=True, slots=True)
class PrefixGroup:
    """The rows up to a cut.

    `keys` are equal where rows are equal; `ends` count each row's tokens and `num_images` its
    images before the cut.
    """

    keys: Sequence[Hashable]
    ends: Sequence[int]
    num_images: int


def prefill(
    captioner: VisionBase,
    rows: Sequence[torch.Tensor],
    requests: Sequence[CaptionRequest],
    vision: Sequence[ImageFeatures],
    share: bool,
) -> PrefillState:
    """Read the tokens `rows` of conversations about two images each; `vision` is theirs in order.

    `share` False reads every row by itself.
    """
    state: PrefillState | None = None
    starts = [0] * len(rows)
    parents = [0] * len(rows)
    num_images = 0
    for group in _prefix_groups(captioner, rows, requests, vision, share):
        index_of = {key: index for index, key in enumerate(dict.fromkeys(group.keys))}
        first_row = {index_of[key]: row for row, key in reversed([*enumerate(group.keys)])}
        distinct_rows = [first_row[index] for index in range(len(index_of))]
        images = [
            image
            for row in distinct_rows
            for image in vision[2 * row + num_images : 2 * row + group.num_images]
        ]
        inputs = _inputs(
            captioner,
            [rows[row][starts[row] : group.ends[row]] for row in distinct_rows],
            torch.cat([vision[0].tokens[:0], *(image.tokens for image in images)]),
            torch.tensor([image.grid for image in images], dtype=torch.long).reshape(-1, 3),
        )
        state = _extend(captioner, state, [parents[row] for row in distinct_rows], inputs)
        parents = [index_of[key] for key in group.keys]
        starts = [*group.ends]
        num_images = group.num_images
    assert state is not None and len(state.ids_BT) == len(rows)
    return state


def _prefix_groups(
    captioner: VisionBase,
    rows: Sequence[torch.Tensor],
    requests: Sequence[CaptionRequest],
    vision: Sequence[ImageFeatures],
    share: bool,
) -> list[PrefixGroup]:
    """Return the cuts that save something, and the end of the rows."""
    whole_rows = PrefixGroup(range(len(rows)), [len(row) for row in rows], 2)
    if not share:
        return [whole_rows]
    second_begins: list[int] = []
    second_ends: list[int] = []
    for number, row in enumerate(rows):
        columns = (row == captioner.vlm.config.image_token_id).nonzero()[:, 0].tolist()
        second_begins.append(columns[captioner.num_tokens(vision[2 * number])])
        second_ends.append(columns[-1] + 1)
    tokens = [row.tolist() for row in rows]
    reference_keys = [
        (request.reference, *row[:cut])
        for request, row, cut in zip(requests, tokens, second_begins, strict=True)
    ]
    pair_keys = [
        (request.reference, request.image, *row[:cut])
        for request, row, cut in zip(requests, tokens, second_ends, strict=True)
    ]
    groups = [
        PrefixGroup(reference_keys, second_begins, 1),
        PrefixGroup(pair_keys, second_ends, 2),
        whole_rows,
    ]
    num_distinct = [len(set(group.keys)) for group in groups]
    num_after = [*num_distinct[1:], len(rows) + 1]
    return [
        group
        for group, num, after in zip(groups, num_distinct, num_after, strict=True)
        if num < after
    ]


def _inputs(
    captioner: VisionBase, rows: Sequence[torch.Tensor], tokens: torch.Tensor, grids: torch.Tensor
) -> Inputs:
    """Return inputs as `VisionBase.collate` makes them, left-padded, of rows on the host; images
    may be missing."""
    masks = [torch.ones_like(row) for row in rows]
    pad = captioner.processor.tokenizer.pad_token_id
    inputs = {
        "input_ids": pad_sequence([*rows], True, pad, "left"),
        "attention_mask": pad_sequence(masks, True, 0, "left"),
        "vision_tokens": tokens,
        "image_grid_thw": grids,
    }
    return captioner.on_device(inputs)


def cache_argument(model: torch.nn.Module, cache: DynamicCache) -> dict[str, DynamicCache]:
    """Return the keyword argument that gives a model its keys and values.

    Releases of transformers before `cache` call it `past_key_values`, which leaves with 5.40.
    """
    parameters = inspect.signature(type(model).forward).parameters
    return {"cache" if "cache" in parameters else "past_key_values": cache}


def _extend(
    captioner: VisionBase, before: PrefillState | None, parents: Sequence[int], inputs: Inputs
) -> PrefillState:
    """Read the rows (U) of `inputs` behind the rows `parents` of `before`."""
    ids = inputs["input_ids"]
    mask = inputs["attention_mask"]
    cache = DynamicCache()
    profiling.add_tokens(inputs)
    model_inputs = captioner.language_model_inputs(captioner.vlm, inputs)
    positions = model_inputs["position_ids"]
    if before is not None:
        parents_U = to_device(torch.tensor(parents), ids.device)
        cache = DynamicCache([(keys[parents_U], values[parents_U]) for keys, values in before.past])
        positions = positions + before.positions_3BT.amax((0, 2))[parents_U, None] + 1
    positions = positions * mask
    model_inputs["position_ids"] = positions
    if before is not None:
        ids = torch.cat([before.ids_BT[parents_U], ids], 1)
        mask = torch.cat([before.mask_BT[parents_U], mask], 1)
        positions = torch.cat([before.positions_3BT[:, parents_U], positions], 2)
    language_model = captioner.vlm.model.language_model
    cached = {"attention_mask": mask, "use_cache": True, **cache_argument(language_model, cache)}
    output = language_model(**{**model_inputs, **cached})
    layers: Any = cache.layers
    past = [(layer.keys, layer.values) for layer in layers]
    return PrefillState(ids, mask, positions, past, output.last_hidden_state[:, -1])
