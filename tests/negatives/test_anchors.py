"""Self-made anchors, images near the reference, and negatives from a window of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from cirloop.artifacts.rows import read_anchors, read_augmented, read_mined
from cirloop.artifacts.store import Store
from cirloop.captioning.config import CaptioningSettings
from cirloop.cli import runner
from cirloop.data.known_positives import KnownPositives
from cirloop.negatives import MiningSettings, miner
from cirloop.negatives.anchors import AnchorSettings, draw_anchors
from cirloop.negatives.base import MiningContext
from cirloop.negatives.miner import MiningInputs
from cirloop.negatives.strategies.near_reference import NearReference
from cirloop.stages.context import RunContext
from cirloop.stages.exclusions import captioned_rows
from cirloop.stages.mine import mine_split
from cirloop.stages.train import train
from cirloop.training.config import TrainingSettings
from cirloop.types import AugmentedTriplet, Query, QueryId, Triplet, UserError
from tests.report.pages import read

ANGLES = np.linspace(0, np.pi / 2, 12)
GALLERY = np.stack([np.cos(ANGLES), np.sin(ANGLES)], 1).astype(np.float32)
"""Twelve images on an arc: the nearer their rows, the more similar."""


def drawn(content: list[str] | None = None, free: int = 12, **settings: Any) -> list[Any]:
    names = content or [str(row) for row in range(12)]
    is_reference = [row >= free for row in range(12)]
    rng = np.random.default_rng(0)
    return draw_anchors(AnchorSettings(**settings), GALLERY, names, is_reference, rng)


def test_anchors_are_no_references_and_their_neighbours_are_near() -> None:
    anchors = drawn(num=100, free=5, neighbors=2, last_rank=2)
    assert [anchor.row for anchor in anchors] == [0, 1, 2, 3, 4]
    for anchor in anchors:
        by_distance = sorted({*range(12)} - {anchor.row}, key=lambda row: abs(row - anchor.row))
        assert {*anchor.neighbors_N} <= {*by_distance[:3]}
        assert anchor.ranks_N.tolist() == [1, 2]
        assert (np.diff(anchor.scores_N) <= 0).all()
    assert [a.row for a in drawn(num=3)] == [a.row for a in drawn(num=3)]
    assert drawn(num=0) == []


def test_neighbours_come_from_the_window() -> None:
    for anchor in drawn(num=12, neighbors=3, first_rank=4, last_rank=7):
        assert {*anchor.ranks_N} <= {4, 5, 6, 7}
        expected = [
            sorted(GALLERY @ GALLERY[anchor.row], reverse=True)[rank] for rank in anchor.ranks_N
        ]
        assert anchor.scores_N == pytest.approx(expected)


def test_copies_are_one_image() -> None:
    content = ["same" if row in (3, 4) else str(row) for row in range(12)]
    anchors = drawn(content, num=12, neighbors=10)
    assert {3, 4} & {anchor.row for anchor in anchors} == {3}
    (of_copy,) = (anchor for anchor in anchors if anchor.row == 3)
    assert 4 not in of_copy.neighbors_N


def test_a_window_without_room_is_refused() -> None:
    with pytest.raises(ValidationError, match="hold fewer than 4 images"):
        AnchorSettings(num=1, neighbors=4, first_rank=8, last_rank=10)


@pytest.mark.parametrize(
    ("group", "settings", "message"),
    [
        (TrainingSettings, {"bundles": {"size": 1}}, "has no room for a text"),
        (
            TrainingSettings,
            {"negatives": {"type": "ranked"}, "negatives_in_batch": 0},
            "do nothing with negatives_in_batch 0",
        ),
        (
            TrainingSettings,
            {"negatives": {"type": "ranked", "first_rank": 9, "last_rank": 3}},
            "raise last_rank or lower first_rank",
        ),
        (
            CaptioningSettings,
            {"min_round_trip_rank": 5, "max_round_trip_rank": 3},
            "no text would be kept",
        ),
    ],
)
def test_settings_that_would_do_nothing_are_refused(
    group: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        group(**settings)


def test_anchors_without_texts_are_refused(small: Any, tmp_path: Path) -> None:
    config = small(tmp_path / "run", mining={"anchors": {"num": 2}}, captioning={"enabled": False})
    with pytest.raises(UserError, match=r"does nothing with captioning\.enabled off"):
        runner.run(config)


def test_images_near_the_reference_are_mined_whatever_the_query_confuses() -> None:
    queries = GALLERY[[11, 11, 11]]
    inputs = MiningInputs(queries, GALLERY, np.array([1, 9, 6]), np.array([0, 5, -1]))
    context = MiningContext(0, vectors_GD=GALLERY)
    settings = MiningSettings(strategy=NearReference(negatives_per_query=2, candidate_pool=3))
    found = [{*result.gallery_indices.tolist()} for result in miner.mine(settings, inputs, context)]
    assert found[0] <= {2, 3, 4}  # 0 is the reference, 1 the target
    assert found[1] <= {3, 4, 6, 7}
    assert [len(each) for each in found] == [2, 2, 0]  # the third's reference is not there


def test_a_pair_with_a_text_is_mined_no_more(small: Any, tmp_path: Path) -> None:
    config = small(
        tmp_path / "run", training={"iteration_0_steps": 0}, mining={"skip_captioned": True}
    )
    run = RunContext(config, Store(config.directory), config.data.build())
    train(run, 0, None, [], None)
    first = mine_split(run, run.embedder(None), 0)["negatives"]
    queries = {each.query.id: each.query for each in run.data.train.triplets}
    written = []
    for number, row in enumerate(first[:-1]):
        reference = queries[row["query"]].reference
        query = Query(QueryId(f"a{number}"), reference, f"new text {number}")
        written.append(AugmentedTriplet(Triplet(query, row["image"]), row["query"], 1, "tiny", "p"))
    second = mine_split(run, run.embedder(None), 0, augmented=written)["negatives"]
    pairs = [{(row["query"], row["image"]) for row in rows} for rows in (first, second)]
    last = first[-1]
    assert pairs[0] & pairs[1] == {(last["query"], last["image"])}
    assert len(pairs[1]) == len(pairs[0])
    barred = captioned_rows(run.data.train, KnownPositives.of(run.data.train), written)
    assert sum(map(len, barred)) >= len(written)


@pytest.mark.full
def test_a_run_with_anchors_bundles_and_ranked_negatives(
    small: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(
        tmp_path / "run",
        num_iterations=2,
        mining={"anchors": {"num": 6}, "num_rounds": 1},
        captioning={"min_verify_probability": 0, "max_round_trip_rank": 0},
        training={
            "negatives": {"type": "ranked", "first_rank": 3, "last_rank": 9},
            "bundles": {"size": 3},
            "start_from": "iteration_0",
            "lr_span": "run",
            "lr_warmup_ratio": 0.0,
        },
    )
    runner.run(config)
    store = Store(config.directory)
    anchors = read_anchors(store.load("hard_negatives_iter_0.json"))
    assert len(anchors.queries) == 6
    human = {each.query.reference for each in config.data.build().train.triplets}
    assert not human & {query.reference for query in anchors.queries}
    texts = read_augmented(store.load("augmented_samples_iter_1.json"))
    from_anchors = [row for row in texts if row.source in {query.id for query in anchors.queries}]
    assert from_anchors
    account = store.load("accounting_iter_1.json").read()
    assert account["accepted_of_anchors"] == len(from_anchors) < account["accepted"] == len(texts)
    assert 0 <= account["true_captions_of_anchors"] <= account["true_captions"]
    summary = store.load("augmented_samples_iter_1.json").read()["summary"]
    assert summary["anchors"]["accepted"] == len(from_anchors)
    assert summary["anchors"]["mined"] == len(anchors.pairs) < summary["mined"]
    assert "of anchors" in capsys.readouterr().out
    page = read((config.directory / "report.html").read_text())
    ((*cells, _),) = page.tables["Accepted texts"][1:]
    assert cells[0:2] + cells[3:] == ["1", str(len(texts)), str(len(from_anchors))]
    assert f"6 of 6; {len(anchors.pairs)} neighbours in all" in page.text
    assert "hard_negatives_iter_1.json" not in store.names
    negatives = read_mined(store.load("ranked_negatives_iter_2.json"))
    assert {row.rank for row in negatives} <= {*range(3, 10)}
    (ranking,) = [
        row
        for row in json.loads((config.directory / "costs.json").read_text())["stages"]
        if row["stage"] == "ranked_negatives_iter_1.json"
    ]
    assert ranking["items"] == len(texts), "mining has the vectors of human queries and gallery"
    names = {row.query for row in negatives}
    assert {row.triplet.query.id for row in texts} <= names
    targets = {row.triplet.query.id: row.triplet.target for row in texts}
    assert not any(targets.get(row.query) == row.image for row in negatives)
    rates = []
    for t in (1, 2):
        log = json.loads(
            (store.load(f"checkpoint_iter_{t}").path / "training_log.json").read_text()
        )
        rates += [row["learning_rate"] for row in log["rows"]]
    peak = config.training.learning_rate
    steps = len(rates)
    expected = [peak * min(1, (steps - step) / (steps - 1)) for step in range(steps)]
    assert rates == pytest.approx(expected)
