"""Embedding: what is alike is embedded once, batches are by length, and neither shows in the result."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cirloop.backbones import Item, Qwen2VLSettings
from cirloop.backbones.features import VisionFeatures
from cirloop.data import ShapesSettings
from cirloop.retrieval.embed import batches_of, embed, query_items

LONG = "Make it blue, and put a small green circle on the left of every large red square that has a white border. " * 3


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
def features(watched: Watched, train: Any, tmp_path_factory: pytest.TempPathFactory) -> VisionFeatures:
    return VisionFeatures(watched.backbone, train.images, tmp_path_factory.mktemp("cache"))


def items_of(train: Any) -> list[Item]:
    """Queries of very different lengths, and images."""
    queries = query_items([t.query for t in train.triplets])
    long = [Item(item.image, LONG) for item in queries[:3]]
    return [*queries, *long, *(Item(image) for image in train.gallery.ids[:6])]


def vectors_of(
    watched: Watched, features: VisionFeatures, items: list[Item], batch_size: int = 64, max_tokens: int = 0
) -> npt.NDArray[np.float32]:
    watched.shapes.clear()
    return embed(watched.backbone, features, items, batch_size, lambda batches, _: batches, "embed", max_tokens)


def plainly(watched: Watched, features: VisionFeatures, items: list[Item], batch_size: int) -> Any:
    """The loop of before there was a budget: sorted by length, so many rows at a time."""
    grids = features.grids([item.image for item in items])
    lengths = [watched.backbone.length(item, grid) for item, grid in zip(items, grids, strict=True)]
    order = sorted(range(len(items)), key=lambda i: (lengths[i], i))
    out = np.zeros((len(items), 256), np.float32)
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = [items[i] for i in rows]
            vision = features.get([item.image for item in batch])
            out[rows] = watched.backbone.module(watched.backbone.inputs(batch, vision)).numpy()
    return out


@pytest.mark.parametrize("batch_size", [5, 64])
def test_rows_alone_give_the_bytes_of_the_plain_loop(
    watched: Watched, train: Any, features: VisionFeatures, batch_size: int
) -> None:
    items = list(dict.fromkeys(items_of(train)))
    ours = vectors_of(watched, features, items, batch_size)
    assert ours.tobytes() == plainly(watched, features, items, batch_size).tobytes()


def test_like_items_are_embedded_once_and_stand_in_every_place(
    watched: Watched, train: Any, features: VisionFeatures
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
    watched: Watched, train: Any, features: VisionFeatures
) -> None:
    one, other = train.gallery.ids[:2]
    made = vectors_of(
        watched, features, [Item(one, "red"), Item(one, "blue"), Item(other, "red"), Item(one), Item(other)]
    )
    assert len({row.tobytes() for row in made}) == 5


def test_a_budget_of_tokens_changes_no_vector_and_saves_padding(
    watched: Watched, train: Any, features: VisionFeatures, caplog: pytest.LogCaptureFixture
) -> None:
    items = items_of(train)
    with caplog.at_level("INFO", "cirloop"):
        by_rows = vectors_of(watched, features, items, 64)
        padded = sum(rows * length for rows, length in watched.shapes)
        by_tokens = vectors_of(watched, features, items, 64, 400)
    assert np.abs(by_rows - by_tokens).max() < 1e-5
    assert sum(rows * length for rows, length in watched.shapes) < 0.8 * padded
    shares = [float(record.message.split("% padding")[0].split()[-1]) for record in caplog.records]
    assert len(shares) == 2 and shares[1] < shares[0] / 2


def test_the_padding_that_is_reported_is_what_the_module_gets(
    watched: Watched, train: Any, features: VisionFeatures, caplog: pytest.LogCaptureFixture
) -> None:
    image = train.gallery.ids[0]
    texts = ["red", LONG]
    ids = [watched.backbone.inputs([Item(image, t)], features.get([image]))["input_ids"].shape[1] for t in texts]
    with caplog.at_level("INFO", "cirloop"):
        vectors_of(watched, features, [Item(image, text) for text in texts])
    share = 100 * (max(ids) - min(ids)) / (2 * max(ids))
    assert f"2 of 2 unlike items in 1 batches, {share:.1f}% padding" in caplog.text


def test_a_vector_that_is_not_finite_is_named_by_its_item(
    watched: Watched, train: Any, features: VisionFeatures
) -> None:
    norm = watched.backbone.vlm.model.language_model.norm.weight
    kept = norm.detach().clone()
    try:
        with torch.no_grad():
            norm.fill_(torch.nan)
        with pytest.raises(RuntimeError, match=r"'red'.*2 in the batch"):
            image = train.gallery.ids[0]
            vectors_of(watched, features, [Item(image, "red"), Item(image, "blue"), Item(image, "red")])
    finally:
        with torch.no_grad():
            norm.copy_(kept)


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 7), st.integers(0, 120))
def test_batches_hold_every_row_once_and_keep_their_bound(lengths: list[int], batch_size: int, budget: int) -> None:
    batches = batches_of(lengths, batch_size, budget)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    flat = [lengths[row] for batch in batches for row in batch]
    assert flat == sorted(flat) and all(batches)
    for batch in batches:
        if budget:
            assert len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= budget
        else:
            assert len(batch) <= batch_size
    if budget:  # no batch could have taken the next one's first row
        for batch, after in pairwise(batches):
            assert (len(batch) + 1) * lengths[after[0]] > budget
