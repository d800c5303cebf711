"""True texts and verdicts from the drawn scenes, against the oracle of the data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cirloop.captioning.base import CaptionRequest
from cirloop.captioning.foundation import SceneFoundation
from cirloop.captioning.parsing import parse_answer
from cirloop.captioning.prompts import REWRITE, VERIFY
from cirloop.data import ShapesSettings
from cirloop.data.cirr import CirrSettings
from cirloop.stages import preflight
from cirloop.types import UserError
from tests.fake_datasets import write_cirr


def test_texts_and_verdicts_are_those_of_the_data_set_s_oracle() -> None:
    train = ShapesSettings(train_families=4, train_triplets=20).build().train
    oracle = train.oracle
    assert oracle is not None
    images = train.gallery.ids
    requests = [CaptionRequest(images[0], image, "") for image in images]
    captioner = SceneFoundation().build()
    answers = captioner.generate(REWRITE, requests, [], 64, [0.0, 0.7], seed=3)
    texts = [parse_answer(both[1].text, "plain") or "" for both in answers]
    written = [i for i, text in enumerate(texts) if text != "none"]
    for i in written:
        assert oracle.text_is_true(images[0], texts[i], images[i])
    distances = [oracle.distance(images[0], image) for image in images]
    assert written == [i for i, distance in enumerate(distances) if 1 <= distance <= 3]
    assert {0, 1, 2, 3} < {*distances}
    text = texts[written[0]]
    verdicts = captioner.yes_probability(
        VERIFY, [CaptionRequest(images[0], image, text) for image in images], []
    )
    assert verdicts == [float(oracle.text_is_true(images[0], text, image)) for image in images]
    assert {*verdicts} == {0.0, 1.0}
    nonsense = CaptionRequest(images[0], images[written[0]], "nicer")
    assert captioner.yes_probability(VERIFY, [nonsense], []) == [0.0]


def test_other_data_sets_have_no_scenes(small: Any, tmp_path: Path) -> None:
    config = small(
        tmp_path / "run",
        foundation={"type": "scenes"},
        data=CirrSettings(),
        data_dir=write_cirr(tmp_path / "data"),
    )
    with pytest.raises(UserError, match="knows `shapes` only, and the data set is cirr"):
        preflight.check(config)
