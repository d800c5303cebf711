"""What is known to be right of training queries, from lines, bytes, equal queries and the
captioner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cirloop.artifacts.atomic import write_json
from cirloop.artifacts.store import Artifact, Store
from cirloop.data.known_positives import (
    CONFIRMED,
    LINE,
    REFERENCE,
    SAME_TEXT,
    TARGET,
    WRITTEN_AGAIN,
    KnownPositives,
    known_positives,
    normal_text,
    read_confirmed,
)
from cirloop.stages.context import RunContext
from cirloop.stages.mine import mine_split
from cirloop.stages.train import train
from cirloop.types import AugmentedTriplet, ImageId, Query, QueryId, Triplet


def triplet(name: str, reference: str, text: str, target: str) -> Triplet:
    return Triplet(Query(QueryId(name), ImageId(reference), text), ImageId(target))


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("Make it RED", "make  it\tred "),
        ("caf\u00e9", "CAFE\u0301"),
        ("Stra\u00dfe", "STRASSE"),
        ("make it red", "Make it red ."),
    ],
)
def test_texts_are_the_same_but_for_case_spaces_full_stop_and_unicode_form(
    text: str, same: str
) -> None:
    assert normal_text(text) == normal_text(same)


def test_other_words_are_other_texts() -> None:
    others = ("make it red", "make it red?", "make itred", "make it rd")
    assert len({normal_text(text) for text in others}) == 4


def test_kinds_of_known_positives() -> None:
    """`content` is the name before the dot: a.1 and a.2 are copies."""
    human = [
        triplet("q0", "r.1", "Make it red", "a.1"),
        triplet("q1", "r.2", "make it  RED", "b.1"),
        triplet("q2", "r.1", "make it blue", "c.1"),
    ]
    again = triplet("q2+1", "r.3", "MAKE IT RED", "d.1")
    written = AugmentedTriplet(again, QueryId("q2"), 1, "tiny", "p")
    lines = {"q0": ("e.1", "a.2"), "q1": ("f.1",)}
    positives = {QueryId(q): frozenset(map(ImageId, images)) for q, images in lines.items()}
    confirmed = [(ImageId("r.2"), "make it red.", ImageId("g.1"))]
    known = KnownPositives(
        human, [written], positives, confirmed, lambda image: image.partition(".")[0]
    )
    assert known.right(human[0].query) == {
        "a": LINE, "e": LINE, "b": SAME_TEXT, "d": SAME_TEXT, "f": SAME_TEXT, "g": CONFIRMED,
    }  # fmt: skip
    assert known.right(human[1].query) == {
        "b": TARGET, "f": LINE, "a": SAME_TEXT, "d": SAME_TEXT, "e": SAME_TEXT, "g": CONFIRMED,
    }  # fmt: skip
    assert known.right(human[2].query) == {"c": TARGET}
    assert known.barred(human[2].query) == {"c": TARGET, "r": REFERENCE}


def test_texts_that_no_check_found_wrong_are_read(tmp_path: Path) -> None:
    """A duplicate is the text of another query or of another image, and right for this image
    too."""
    right = ("same as the original text", "duplicate", "a surer text was kept")
    wrong = ("not verified", "round trip", "cut off", "unparseable")
    reasons = dict(zip("abcdefgh", (*right, "enough for this query", *wrong), strict=True))
    rows = [("r", "t", image, reason) for image, reason in reasons.items()]
    samples = write_samples(tmp_path / "augmented_samples_iter_1.json", rows)
    assert read_confirmed(samples) == [("r", "t", image) for image in "abcd"]


def write_samples(path: Path, rejected: list[tuple[str, str, str, str]]) -> Artifact:
    names = ("reference", "text", "image", "reason")
    rows = [dict(zip(names, row, strict=True)) for row in rejected]
    write_json(path, {"schema": 1, "accepted": [], "rejected": rows})
    return Artifact(path.name, path, "")


@pytest.mark.full
def test_what_the_captioner_confirmed_is_mined_no_more(small: Any, tmp_path: Path) -> None:
    """The same model mines twice; of the first time every image but the last was confirmed."""
    config = small(tmp_path / "run", training={"iteration_0_steps": 0})
    run = RunContext(config, Store(config.directory), config.data.build())
    train(run, 0, None, [], None)
    first = mine_split(run, run.embedder(None), 0)
    confirmed = first["negatives"][:-1]
    queries = {each.query.id: each.query for each in run.data.train.triplets}
    asked = [(queries[row["query"]], row["image"]) for row in confirmed]
    rows = [(q.reference, q.text, image, WRITTEN_AGAIN) for q, image in asked]
    samples = write_samples(tmp_path / "augmented_samples_iter_1.json", rows)
    known = known_positives(run.data.train, [samples])
    second = mine_split(run, run.embedder(None), 0, known)
    mined = (first["negatives"], second["negatives"])
    pairs = [{(row["query"], row["image"]) for row in rows} for rows in mined]
    last = first["negatives"][-1]
    assert pairs[0] & pairs[1] == {(last["query"], last["image"])}
    assert len(pairs[1]) == len(pairs[0])
    assert second["summary"]["left_out"]["confirmed by the captioner"] == len(confirmed)
    assert set(first["summary"]["left_out"].values()) == {0}
