"""From questions that were read to the tokens of their answers.

Tokens are chosen by transformers' `generate`, with what `base.sampling` leaves of the model's
generation_config.json. Rows that have ended cost as much as others there: when half have, the rest
goes on alone.

B rows, T columns, D numbers of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer

from cirloop.captioning.base import without_padding
from cirloop.captioning.prefix_cache import KeysValues, Reading


class Roomy(DynamicLayer):
    """Keys and values (B, heads, T, D) of a layer with room for more columns, into which new tokens
    are written. transformers' layer copies all it has for every token."""

    def __init__(self, keys_values: KeysValues, columns: int) -> None:
        super().__init__()
        self.lazy_initialization(*keys_values)
        self._room = [
            states.new_empty(*states.shape[:2], columns, states.shape[3]) for states in keys_values
        ]
        self._write(0, keys_values)

    def _write(self, start: int, keys_values: KeysValues) -> KeysValues:
        end = start + keys_values[0].shape[2]
        for room, states in zip(self._room, keys_values, strict=True):
            room[:, :, start:end] = states
        self.keys, self.values = written = self._room[0][:, :, :end], self._room[1][:, :, :end]
        return written

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> KeysValues:
        return self._write(self.get_seq_length(), (key_states, value_states))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        end, self._room = self.get_seq_length(), [room[indices] for room in self._room]
        self.keys, self.values = (room[:, :, :end] for room in self._room)


class HalfDone(StoppingCriteria):
    """Stops all rows as soon as half have one of the tokens `ends` behind column `start`."""

    def __init__(self, start: int, ends: torch.Tensor) -> None:
        self.start, self.ends = start, ends

    def ended(self, ids_BT: torch.Tensor) -> torch.Tensor:
        return torch.isin(ids_BT[:, self.start :], self.ends).any(1)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        ended_B = self.ended(input_ids)
        return (2 * ended_B.sum() >= len(ended_B)).expand(len(ended_B))


def decode(vlm: Any, reading: Reading, max_new_tokens: int, **how: Any) -> list[torch.Tensor]:
    """The tokens of each row's answer, padded behind its end; `how` goes to `generate`. `reading`
    stays as it is."""
    mask, positions = reading.mask_BT, reading.positions_3BT
    ids = without_padding(reading.ids_BT, mask)
    start, stop = ids.shape[1], ids.shape[1] + max_new_tokens
    half = HalfDone(start, _ends(vlm, ids.device))
    # `generate` reads at least one token itself: the last
    cache = DynamicCache()
    cache.layers = [
        Roomy((keys[:, :, :-1], values[:, :, :-1]), stop) for keys, values in reading.past
    ]
    out: dict[int, torch.Tensor] = {}
    rows_B = torch.arange(len(ids), device=ids.device)
    while len(rows_B):
        made = vlm.generate(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            max_new_tokens=stop - ids.shape[1],
            stopping_criteria=StoppingCriteriaList([half]),
            **how,
        )
        assert torch.equal(made[:, : ids.shape[1]], ids), (
            "generate() did not return the prompt first"
        )
        num = made.shape[1] - ids.shape[1]
        ended_B = half.ended(made) | (made.shape[1] == stop)
        out |= dict(zip(rows_B[ended_B].tolist(), made[ended_B, start:], strict=True))
        left = (~ended_B).nonzero()[:, 0]
        cache.batch_select_indices(left)
        more = positions[:, left, -1:] + torch.arange(1, num + 1, device=ids.device)
        ids, rows_B, positions = (
            made[left],
            rows_B[left],
            torch.cat([positions[:, left], more], dim=2),
        )
        mask = torch.nn.functional.pad(mask[left], (0, num), value=1)
    return [out[row] for row in range(len(out))]


def _ends(vlm: Any, device: torch.device) -> torch.Tensor:
    """Tokens that end an answer."""
    found = vlm.generation_config.eos_token_id
    return torch.tensor(
        [] if found is None else [found] if isinstance(found, int) else found, device=device
    ).long()
