"""Embedding: what is alike is embedded once, batches are of one length, and neither shows in the
result."""

from __future__ import annotations

import os
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cirloop.backbones import EmbedInput, Qwen2VLSettings
from cirloop.backbones.features import VisionCache
from cirloop.data import ShapesSettings
from cirloop.monitoring import profiling
from cirloop.retrieval.embed import NonFiniteEmbedding, batches_of, embed, embed_texts, query_items
from cirloop.types import UserError

LONG = (
    "Make it blue, and put a small green circle on the left of every large red square that has a"
    " white border. " * 3
)


class Watched:
    """The real embedder, and the shapes of what its module is called with."""

    def __init__(self) -> None:
        self.backbone: Any = Qwen2VLSettings(dtype="float32").build()
        self.shapes: list[tuple[int, int]] = []
        self.backbone.module.register_forward_pre_hook(
            lambda _, args: self.shapes.append(tuple(args[0]["input_ids"].shape))
        )


@pytest.fixture(scope="module")
def watched() -> Watched:
    return Watched()


@pytest.fixture(scope="module")
def train() -> Any:
    return ShapesSettings(train_families=3, train_triplets=14, eval_families=2).build().train


@pytest.fixture(scope="module")
def features(watched: Watched, train: Any, tmp_path_factory: pytest.TempPathFactory) -> VisionCache:
    return VisionCache(watched.backbone, train.images, tmp_path_factory.mktemp("cache"))


def items_of(train: Any) -> list[EmbedInput]:
    """Return queries of very different lengths, and images."""
    queries = query_items([t.query for t in train.triplets])
    long = [EmbedInput(item.image, LONG) for item in queries[:3]]
    return [*queries, *long, *(EmbedInput(image) for image in train.gallery.ids[:6])]


def vectors_of(
    watched: Watched,
    features: VisionCache,
    items: list[EmbedInput],
    batch_size: int = 64,
    max_tokens: int = 0,
) -> npt.NDArray[np.float32]:
    watched.shapes.clear()
    options = (batch_size, lambda batches, _: batches, "embed", max_tokens)
    return embed(watched.backbone, features, items, *options)


def alone(watched: Watched, features: VisionCache, items: list[EmbedInput]) -> Any:
    """Each item by itself."""
    out = np.zeros((len(items), 256), np.float32)
    with torch.inference_mode():
        for row, item in enumerate(items):
            inputs = watched.backbone.inputs([item], features.get([item.image]))
            out[row] = watched.backbone.module(inputs)[0].numpy()
    return out


@pytest.mark.skipif(
    "MKL_CBWR" not in os.environ,
    reason="not an Intel processor: bits of a product depend on its size",
)
@pytest.mark.parametrize(("batch_size", "max_tokens"), [(1, 0), (5, 0), (64, 0), (64, 200)])
def test_no_batch_size_changes_a_bit(
    watched: Watched, train: Any, features: VisionCache, batch_size: int, max_tokens: int
) -> None:
    items = list(dict.fromkeys(items_of(train)))
    ours = vectors_of(watched, features, items, batch_size, max_tokens)
    assert len(watched.shapes) < len(items) or batch_size == 1
    assert ours.tobytes() == alone(watched, features, items).tobytes()


class Scarce:
    """A device that holds `most` rows of the module at once; from torch's own error on it goes as
    on a GPU."""

    def __init__(self, module: torch.nn.Module, most: int) -> None:
        self.calls: list[int] = []

        def look(_: Any, args: Any) -> None:
            self.calls.append(len(args[0]["input_ids"]))
            if self.calls[-1] > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

        self.hook = module.register_forward_pre_hook(look)


@pytest.mark.full
@pytest.mark.parametrize("most", [1, pytest.param(3, marks=pytest.mark.full)])
def test_batches_that_memory_does_not_hold_are_halved_and_change_nothing(
    watched: Watched, train: Any, features: VisionCache, most: int, caplog: pytest.LogCaptureFixture
) -> None:
    items = list(dict.fromkeys(items_of(train)))
    whole = vectors_of(watched, features, items)
    scarce = Scarce(watched.backbone.module, most)
    try:
        with profiling.metering() as spent:
            ours = vectors_of(watched, features, items)
    finally:
        scarce.hook.remove()
    too_many = [num for num in scarce.calls if num > most]
    assert spent.splits == len(too_many) > 0 and spent.items == len(items)
    assert f"out of memory with {max(too_many)} of items to embed; in halves now" in caplog.text
    assert np.abs(ours - whole).max() < 1e-6
    if "MKL_CBWR" in os.environ:
        assert ours.tobytes() == whole.tobytes()


def test_an_item_that_memory_does_not_hold_alone_is_an_error_with_the_way_out(
    watched: Watched, train: Any, features: VisionCache
) -> None:
    scarce = Scarce(watched.backbone.module, 0)
    try:
        said = r"out of memory with one of items to embed: CUDA.*\nSet model.max_pixels"
        with pytest.raises(UserError, match=said):
            vectors_of(watched, features, items_of(train))
    finally:
        scarce.hook.remove()


def test_like_items_are_embedded_once_and_stand_in_every_place(
    watched: Watched, train: Any, features: VisionCache
) -> None:
    items = list(dict.fromkeys(items_of(train)))
    repeated = [*items, *items[::-1], items[3], *items[:5]]
    once = vectors_of(watched, features, items, 5)
    shapes = list(watched.shapes)
    ours = vectors_of(watched, features, repeated, 5)
    assert watched.shapes == shapes, "the same batches"
    places = [items.index(item) for item in repeated]
    assert ours.tobytes() == once[places].tobytes()


def test_items_that_differ_in_text_or_image_alone_are_not_alike(
    watched: Watched, train: Any, features: VisionCache
) -> None:
    one, other = train.gallery.ids[:2]
    queries = [EmbedInput(one, "red"), EmbedInput(one, "blue"), EmbedInput(other, "red")]
    made = vectors_of(watched, features, [*queries, EmbedInput(one), EmbedInput(other)])
    assert len({row.tobytes() for row in made}) == 5


def test_nothing_is_padded_and_the_lengths_are_those_of_the_inputs(
    watched: Watched, train: Any, features: VisionCache, caplog: pytest.LogCaptureFixture
) -> None:
    items = list(dict.fromkeys(items_of(train)))
    with caplog.at_level("INFO", "cirloop"), profiling.metering() as spent:
        vectors_of(watched, features, items)
    assert spent.padding == 0
    assert spent.tokens == sum(rows * length for rows, length in watched.shapes)
    length_of = watched.backbone.sequence_length
    lengths = [length_of(item, features.grids([item.image])[0]) for item in items]
    assert {length for _, length in watched.shapes} == {*lengths} and len({*lengths}) > 2
    num, batches = len(items), len(watched.shapes)
    assert f"{num} of {num} unique inputs in {batches} batches" in caplog.text


def test_a_vector_that_is_not_finite_is_named_by_its_item(
    watched: Watched, train: Any, features: VisionCache
) -> None:
    norm = watched.backbone.vlm.model.language_model.norm.weight
    kept = norm.detach().clone()
    try:
        with torch.no_grad():
            norm.fill_(torch.nan)
        with pytest.raises(RuntimeError, match=r"'red'.*2 in the batch"):
            items = [EmbedInput(train.gallery.ids[0], text) for text in ("red", "blue", "red")]
            vectors_of(watched, features, items)
        with pytest.raises(NonFiniteEmbedding, match=r": text 'a hat' \(2 in the batch\)"):
            embed_texts(watched.backbone, ["a hat", "a dress"])
    finally:
        with torch.no_grad():
            norm.copy_(kept)


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 7), st.integers(0, 120))
def test_batches_hold_every_row_once_and_keep_their_bound(
    lengths: list[int], batch_size: int, budget: int
) -> None:
    batches = batches_of(lengths, batch_size, budget)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    flat = [lengths[row] for batch in batches for row in batch]
    assert flat == sorted(flat) and all(batches)
    for batch in batches:
        assert len({lengths[row] for row in batch}) == 1
        if budget:
            assert len(batch) == 1 or len(batch) * lengths[batch[0]] <= budget
        else:
            assert len(batch) <= batch_size
    for batch, after in pairwise(batches):  # no batch could have taken the next one's first row
        length = lengths[batch[0]]
        full = (len(batch) + 1) * length > budget if budget else len(batch) == batch_size
        assert full or lengths[after[0]] > length
