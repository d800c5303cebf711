"""GroceryStoreDataset: what is drawn from its classes, and what is wrong in its files."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from cirloop.data.grocery.edits import find_edits, share_alone
from cirloop.data.grocery.load import GrocerySettings
from cirloop.data.paths import DataPaths
from cirloop.types import UserError
from tests.fake_datasets import GROCERIES, write_grocery

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "grocery"
real = pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} is not there")


def build(directory: Path, cache: Path, **settings: object):  # type: ignore[no-untyped-def]
    options = GrocerySettings(**settings)  # type: ignore[arg-type]
    return options.build(DataPaths(directory, cache, lambda items, title: items))


def test_edits_lead_to_products_that_fit() -> None:
    products = {
        "golden": {"product": "apple", "colour": "yellow"},
        "granny": {"product": "apple", "colour": "green"},
        "lime": {"product": "lime", "colour": "green"},
        "milk": {"product": "milk", "brand": "Arla"},
    }
    edits = find_edits(products)
    assert edits[(("colour", "green"),)] == {"golden": frozenset({"granny"})}
    assert edits[(("colour", "*"),)] == {
        "golden": frozenset({"granny"}),
        "granny": frozenset({"golden"}),
    }
    assert edits[(("colour", "green"), ("product", "lime"))] == {"golden": frozenset({"lime"})}
    assert not any("brand" in dict(edit) for edit in edits)  # milk has other attributes


def test_the_share_that_a_text_alone_finds() -> None:
    one = frozenset({"a"})
    assert share_alone({"x": one, "y": one}) == 1
    assert share_alone({"x": one, "y": frozenset({"b"})}) == 0.5
    everything = frozenset({"a", "b", "c"})
    assert share_alone({"x": everything}) == 1


def test_splits_have_their_own_photographs_and_words(tmp_path: Path) -> None:
    data = build(write_grocery(tmp_path / "data"), tmp_path, train_triplets=40, eval_queries=60)
    train, (val,) = data.train, data.eval_splits("val")
    assert len(train.triplets) == 40 and len(val.queries) == 60
    assert all(image.startswith("train/") for image in train.gallery.ids)
    assert all(image.startswith("val/") for image in val.gallery.ids)
    assert not train.positives and train.oracle is not None and val.relevance is not None
    for triplet in train.triplets:
        assert triplet.target in train.oracle.positives(triplet.query)
        assert train.oracle.text_is_true(
            triplet.query.reference, triplet.query.text, triplet.target
        )
    for query in val.queries:
        assert val.relevance.targets[query.id] in val.relevance.positives[query.id]
        assert query.reference not in val.relevance.positives[query.id]
    texts = {query.text for query in val.queries}
    assert texts - {triplet.query.text for triplet in train.triplets}
    assert {val.labeled.cluster_of(query) for query in val.queries} <= {
        query.reference.split("/")[2] for query in val.queries
    }


def test_the_same_seed_draws_the_same_and_another_one_others(tmp_path: Path) -> None:
    directory = write_grocery(tmp_path / "data")
    first, again, other = (
        build(directory, tmp_path, train_triplets=30, eval_queries=60, subset_seed=seed)
        for seed in (0, 0, 1)
    )
    assert first.train.triplets == again.train.triplets != other.train.triplets
    assert first.eval_splits("val")[0].queries == other.eval_splits("val")[0].queries


def test_more_than_can_be_drawn_is_refused(tmp_path: Path) -> None:
    data = build(write_grocery(tmp_path / "data"), tmp_path, train_triplets=5_000)
    with pytest.raises(UserError, match=r"only \d+ were found. Lower data.train_triplets"):
        _ = data.train


def test_what_is_wrong_in_the_lists_is_said_at_once(tmp_path: Path) -> None:
    directory = write_grocery(tmp_path / "data")
    path = directory / "dataset" / "train.txt"
    lines = path.read_text().splitlines()
    lines[0] = lines[0].replace(", 0, 0", ", 1, 0")
    lines[1] = "one field"
    lines[2] = "../outside/Lime/x.png, 4, 0"
    lines.append("train/Food/Durian/x.png, 99, 0")
    path.write_text("\n".join(lines))
    with pytest.raises(UserError) as caught:
        _ = build(directory, tmp_path, train_triplets=10).train
    message = str(caught.value)
    assert "class '1' of classes.csv is not 'Golden-Delicious'" in message
    assert "found 'one field'" in message and "../outside" in message and "'Durian'" in message


@real
def test_the_real_photographs(tmp_path: Path) -> None:
    data = build(REAL, tmp_path)
    (val,) = data.eval_splits("val")
    assert (len(data.train.gallery.ids), len(val.gallery.ids)) == (2640, 296)
    assert (len(data.train.triplets), len(val.queries)) == (600, 1000)
    catalogue = data.train.catalogue
    assert catalogue is not None
    same = [
        triplet
        for triplet in data.train.triplets
        if catalogue.is_true(triplet.query.reference, triplet.query.text, triplet.target)
    ]
    assert len(same) == 600
    assert val.relevance is not None
    by_text: dict[str, Counter[str]] = {}
    for query in val.queries:
        right = {image.split("/")[-2] for image in val.relevance.positives[query.id]}
        by_text.setdefault(query.text, Counter()).update(right)
    found = sum(products.most_common(1)[0][1] for products in by_text.values())
    assert len(by_text) > 30 and found < 500, "one product a text must not answer half of val"


@pytest.mark.parametrize("text", ["{product} in {colour}", "{colour}, not {old colour}"])
def test_words_that_say_what_stays_are_refused(tmp_path: Path, text: str) -> None:
    phrases = tmp_path / "phrases.yaml"
    phrases.write_text(f'both:\n  colour: ["{text}"]\ntrain:\n  product: ["{{product}}"]\n')
    data = build(write_grocery(tmp_path / "data"), tmp_path, phrases=phrases)
    with pytest.raises(UserError, match="has a slot of what stays"):
        _ = data.train


def test_products_without_an_edit_are_refused(tmp_path: Path) -> None:
    attributes = tmp_path / "attributes.json"
    attributes.write_text(json.dumps({name: {"product": name} for name in GROCERIES}))
    data = build(write_grocery(tmp_path / "data"), tmp_path, attributes=attributes)
    with pytest.raises(UserError, match="have no edit that leaves the product open"):
        _ = data.train


@real
def test_the_catalogue_that_comes_with_the_photographs(tmp_path: Path) -> None:
    data = build(REAL, tmp_path, attributes=REAL / "attributes.json", train_triplets=50)
    assert len(data.train.triplets) == 50
