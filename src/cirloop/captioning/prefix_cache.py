"""Questions read by the language model, what several have in common only once.

A conversation is cut where its second picture begins and where that ends. Rows that are alike up to
a cut, in pictures and tokens, are one row until there; its keys and values are then repeated for
all that go on from it. So a reference picture is read once for all its mined images, and a pair of
pictures once for all texts about it.

B rows, T columns, U rows that differ up to a cut, D dimensions.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from cirloop.backbones.base import VisionInput
from cirloop.backbones.vision import Inputs
from cirloop.captioning.base import Ask
from cirloop.monitoring import profiling

KeysValues = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Reading:
    """Rows that were read. Padding stands to the left of each part, so inside a row where there are
    several."""

    ids_BT: torch.Tensor
    mask_BT: torch.Tensor
    positions_3BT: torch.Tensor
    """Of M-RoPE: those that the whole row has when it is read at once."""
    past: list[KeysValues]
    """Keys and values (B, heads, T, width) of each layer."""
    last_BD: torch.Tensor
    """Hidden state of the last token."""


@dataclass(frozen=True, slots=True)
class Part:
    """The rows up to a cut: `names` are equal where rows are alike, `ends` count tokens, `pictures`
    those before it."""

    names: Sequence[Hashable]
    ends: Sequence[int]
    pictures: int


def read(
    captioner: Any,
    rows: Sequence[torch.Tensor],
    asks: Sequence[Ask],
    vision: Sequence[VisionInput],
    share: bool,
) -> Reading:
    """Tokens `rows` of conversations about two pictures each, `vision` theirs in order. `share`
    False reads every row for itself."""
    made: Reading | None = None
    begins, seen, groups = [0] * len(rows), 0, [0] * len(rows)
    for part in _parts(captioner, rows, asks, vision, share):
        place = {name: number for number, name in enumerate(dict.fromkeys(part.names))}
        first = {place[name]: row for row, name in reversed([*enumerate(part.names)])}
        alike = [first[number] for number in range(len(place))]
        pictures = [
            picture for row in alike for picture in vision[2 * row + seen : 2 * row + part.pictures]
        ]
        inputs = _inputs(
            captioner,
            [rows[row][begins[row] : part.ends[row]] for row in alike],
            torch.cat([vision[0].tokens[:0], *(picture.tokens for picture in pictures)]),
            torch.tensor([picture.grid for picture in pictures], dtype=torch.long).reshape(-1, 3),
        )
        made = _go_on(captioner, made, [groups[row] for row in alike], inputs)
        groups, begins, seen = [place[name] for name in part.names], [*part.ends], part.pictures
    assert made is not None and len(made.ids_BT) == len(rows)
    return made


def _parts(
    captioner: Any,
    rows: Sequence[torch.Tensor],
    asks: Sequence[Ask],
    vision: Sequence[VisionInput],
    share: bool,
) -> list[Part]:
    """Cuts that save something, and the end."""
    whole = Part(range(len(rows)), [len(row) for row in rows], 2)
    if not share:
        return [whole]
    begins, ends = [], []
    for number, row in enumerate(rows):
        places = (row == captioner.vlm.config.image_token_id).nonzero()[:, 0].tolist()
        begins.append(places[captioner.num_tokens(vision[2 * number])])
        ends.append(places[-1] + 1)
    words = [row.tolist() for row in rows]
    ones = [(ask.first, *row[:cut]) for ask, row, cut in zip(asks, words, begins, strict=True)]
    pairs = [
        (ask.first, ask.second, *row[:cut]) for ask, row, cut in zip(asks, words, ends, strict=True)
    ]
    parts = [Part(ones, begins, 1), Part(pairs, ends, 2), whole]
    num = [len(set(part.names)) for part in parts]
    return [
        part
        for part, here, after in zip(parts, num, [*num[1:], len(rows) + 1], strict=True)
        if here < after
    ]


def _inputs(
    captioner: Any, rows: Sequence[torch.Tensor], tokens: torch.Tensor, grids: torch.Tensor
) -> Inputs:
    """As `VisionBase.tensors` has them, left-padded; there need not be a picture."""
    masks = [torch.ones_like(row) for row in rows]
    inputs = {
        "input_ids": pad_sequence(
            [*rows], True, captioner.processor.tokenizer.pad_token_id, "left"
        ),
        "attention_mask": pad_sequence(masks, True, 0, "left"),
        "vision_tokens": tokens,
        "image_grid_thw": grids,
    }
    return {name: tensor.to(captioner.device) for name, tensor in inputs.items()}


def _go_on(
    captioner: Any, before: Reading | None, parents: Sequence[int], inputs: Inputs
) -> Reading:
    """The rows (U) of `inputs`, read behind the rows `parents` of `before`."""
    ids, mask, cache = inputs["input_ids"], inputs["attention_mask"], DynamicCache()
    profiling.add_tokens(inputs)
    placed = captioner.place(captioner.vlm, inputs)
    positions = placed["position_ids"]
    if before is not None:
        from_U = torch.tensor(parents, device=ids.device)
        cache = DynamicCache([(keys[from_U], values[from_U]) for keys, values in before.past])
        positions = positions + before.positions_3BT.amax((0, 2))[from_U, None] + 1
    placed["position_ids"] = positions = positions * mask
    if before is not None:
        ids, mask = (
            torch.cat([before.ids_BT[from_U], ids], 1),
            torch.cat([before.mask_BT[from_U], mask], 1),
        )
        positions = torch.cat([before.positions_3BT[:, from_U], positions], 2)
    out = captioner.vlm.model.language_model(
        **{**placed, "attention_mask": mask, "past_key_values": cache, "use_cache": True}
    )
    layers: Any = cache.layers
    past = [(layer.keys, layer.values) for layer in layers]
    return Reading(ids, mask, positions, past, out.last_hidden_state[:, -1])
