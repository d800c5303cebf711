"""Decoding of answers from prefilled prompts.

Tokens are chosen by transformers' `generate`, with what `base.sampling_kwargs` keeps of the model's
generation_config.json. There, rows that have ended cost as much as others: when half of the rows
have ended, the rest continues without them.

B rows, T columns, D numbers of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer

from cirloop.backbones.base import VisionLanguageModel
from cirloop.captioning.base import without_padding
from cirloop.captioning.prefix_cache import KeysValues, PrefillState, cache_argument


class PreallocatedCacheLayer(DynamicLayer):
    """Keys and values (B, heads, T, D) of a layer, with room into which new tokens are written.

    transformers' own layer copies all that it holds for every token.
    """

    def __init__(self, keys_values: KeysValues, columns: int) -> None:
        super().__init__()
        self.lazy_initialization(*keys_values)
        self._buffers = [
            states.new_empty(*states.shape[:2], columns, states.shape[3]) for states in keys_values
        ]
        self._write(0, keys_values)

    def _write(self, start: int, keys_values: KeysValues) -> KeysValues:
        end = start + keys_values[0].shape[2]
        for buffer, states in zip(self._buffers, keys_values, strict=True):
            buffer[:, :, start:end] = states
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)
        return self.keys, self.values

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *args: object,
        **kwargs: object,
    ) -> KeysValues:
        """Append the states of new tokens; return the keys and values of all tokens."""
        return self._write(self.get_seq_length(), (key_states, value_states))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices` only."""
        end = self.get_seq_length()
        self._buffers = [buffer[indices] for buffer in self._buffers]
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)


class StopWhenHalfFinished(StoppingCriteria):
    """Stops all rows as soon as half of them have one of the tokens `ends` behind column `start`.

    Column `start` is where the answer begins.
    """

    def __init__(self, start: int, ends: torch.Tensor) -> None:
        self.start = start
        self.ends = ends

    def finished(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """Return which rows (B) hold an end token in their answer."""
        return torch.isin(ids_BT[:, self.start :], self.ends).any(1)

    def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        finished_B = self.finished(input_ids)
        return (2 * finished_B.sum() >= len(finished_B)).expand(len(finished_B))


def decode(
    vlm: VisionLanguageModel, prefilled: PrefillState, max_new_tokens: int, **generate_kwargs: Any
) -> list[torch.Tensor]:
    """Decode the tokens of each row's answer, padded behind its end, on the host.

    `generate_kwargs` go to `generate`. `prefilled` is not changed.
    """
    mask = prefilled.mask_BT
    positions = prefilled.positions_3BT
    ids = without_padding(prefilled.ids_BT, mask)
    start = ids.shape[1]
    stop = start + max_new_tokens
    criterion = StopWhenHalfFinished(start, _end_tokens(vlm, ids.device))
    cache = _decoding_cache(prefilled, stop)
    answers: dict[int, torch.Tensor] = {}
    rows_B = torch.arange(len(ids), device=ids.device)
    while len(rows_B):
        output = vlm.generate(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            max_new_tokens=stop - ids.shape[1],
            stopping_criteria=StoppingCriteriaList([criterion]),
            **cache_argument(vlm, cache),
            **generate_kwargs,
        )
        assert torch.equal(output[:, : ids.shape[1]], ids), (
            "generate() did not return the prompt first"
        )
        num_new = output.shape[1] - ids.shape[1]
        finished_B = criterion.finished(output) | (output.shape[1] == stop)
        ended = output[finished_B, start:].cpu()
        answers |= dict(zip(rows_B[finished_B].tolist(), ended, strict=True))
        remaining = (~finished_B).nonzero()[:, 0]
        cache.batch_select_indices(remaining)
        ids = output[remaining]
        rows_B = rows_B[remaining]
        steps = torch.arange(1, num_new + 1, device=ids.device)
        positions = positions[:, remaining]
        positions = torch.cat([positions, positions[:, :, -1:] + steps], dim=2)
        mask = torch.nn.functional.pad(mask[remaining], (0, num_new), value=1)
    return [answers[row] for row in range(len(answers))]


def _decoding_cache(prefilled: PrefillState, num_columns: int) -> DynamicCache:
    """Return a cache of all prompt tokens but the last, which `generate` reads itself."""
    cache = DynamicCache()
    cache.layers = [
        PreallocatedCacheLayer((keys[:, :, :-1], values[:, :, :-1]), num_columns)
        for keys, values in prefilled.past
    ]
    return cache


def _end_tokens(vlm: VisionLanguageModel, device: torch.device) -> torch.Tensor:
    """Return the tokens that end an answer; none where generation_config.json names none."""
    ends = vlm.generation_config.eos_token_id
    if ends is None:
        ends = []
    return torch.tensor([ends] if isinstance(ends, int) else ends, device=device).long()
