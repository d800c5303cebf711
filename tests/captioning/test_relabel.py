"""Mined images that a foundation model calls right for the human text become its positives."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cirloop.artifacts.rows import read_augmented
from cirloop.artifacts.store import Store
from cirloop.captioning.base import CaptionRequest
from cirloop.captioning.config import CaptioningSettings, RelabelSettings
from cirloop.captioning.foundation import TemplateFoundation
from cirloop.captioning.planted import draw_pairs
from cirloop.captioning.relabel import HUMAN_TEXT, judge_mined
from cirloop.cli import runner
from cirloop.data.known_positives import KnownPositives
from cirloop.training.batches import BatchSampler
from cirloop.types import ImageId, MinedNegative, Query, QueryId, Triplet, UserError

TRIPLETS = [
    Triplet(Query(QueryId(f"q{i}"), ImageId(f"r{i}"), f"text {i}"), ImageId(f"t{i}"))
    for i in range(20)
]
MINED = [CaptionRequest(ImageId("r0"), ImageId(f"m{i}"), "text 0") for i in range(4)]


def judged(truth: float, lie: float, **settings: Any) -> Any:
    """Judge with P(yes) `truth` for planted right pairs, `lie` for wrong ones, 0.0, 0.3, 0.6, 0.9
    for mined ones."""

    def yes_probability(requests: Sequence[CaptionRequest]) -> list[float]:
        if requests == MINED:
            return [0.0, 0.3, 0.6, 0.9]
        right = {(t.query.reference, t.query.text, t.target) for t in TRIPLETS}
        return [truth if (r.reference, r.text, r.image) in right else lie for r in requests]

    planted = draw_pairs(TRIPLETS, 10, 1, lambda _: False)
    return judge_mined(MINED, planted, RelabelSettings(**settings), yes_probability)


def test_what_is_called_right_is_kept_with_its_probability() -> None:
    positives, judgement = judged(0.8, 0.1, min_probability=0.5)
    assert positives == {2: 0.6, 3: 0.9}
    assert judgement == {"precision": 1.0, "recall": 1.0, "judged": 4, "right": 2, "kept": 2}


@pytest.mark.parametrize(("truth", "lie", "precision"), [(0.8, 0.8, 0.1), (0.1, 0.1, None)])
def test_a_judge_that_is_not_precise_decides_nothing(
    truth: float, lie: float, precision: float | None
) -> None:
    positives, judgement = judged(truth, lie, min_probability=0.5)
    assert positives == {} and judgement["precision"] == precision
    assert (judgement["right"], judgement["kept"]) == (2, 0)
    if precision:
        assert len(judged(truth, lie, min_probability=0.5, min_precision=precision)[0]) == 2


def test_a_rule_that_sees_no_image_cannot_judge() -> None:
    settings = CaptioningSettings(
        min_verify_probability=0, relabel=RelabelSettings(min_probability=0.5)
    )
    with pytest.raises(UserError, match=r"captioning\.relabel\.min_probability 0\.5: .* to 0"):
        settings.check(TemplateFoundation())


def test_a_run_trains_on_further_positives_and_never_against_them(
    small: Any, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    config = small(
        directory,
        foundation={"type": "catalogue"},
        captioning={"relabel": {"min_probability": 0.5}},
        mining={"strategy": {"type": "top_k", "negatives_per_query": 10}},
    )
    runner.run(config)
    samples = Store(directory).load("augmented_samples_iter_1.json")
    content = samples.read()
    judgement = content["summary"]["relabelled"]
    assert judgement["precision"] == judgement["recall"] == 1
    assert judgement["kept"] == len(content["relabelled"]) > 0
    account = json.loads((directory / "accounting_iter_1.json").read_text())
    assert account["relabelled"] == account["relabelled_right"] == judgement["kept"]
    assert account["true_captions"] == account["accepted"] > 0
    rows = read_augmented(samples)
    relabelled = [row for row in rows if row.prompt == HUMAN_TEXT]
    written = {(row.source, row.triplet.target) for row in rows if row.prompt != HUMAN_TEXT}
    assert not written & {(row.source, row.triplet.target) for row in relabelled}

    human = config.data.build().train
    mined = [
        MinedNegative(row.source, row.triplet.target, 1, 0.0, 0, 0.0, "top_k") for row in relabelled
    ]
    known = KnownPositives.of(human, rows)
    sampler = BatchSampler(human.triplets, rows, mined, 8, 0.5, 2, seed=0, known=known)
    assert sampler.num_known_positives == len(mined)
