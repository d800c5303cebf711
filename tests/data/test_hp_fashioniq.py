"""HP-FashionIQ: its sentences, its two numbers, and each kind of mistake in its file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cirloop.data import hp_fashioniq
from cirloop.data.hp_fashioniq import load_queries, restore_captions
from cirloop.evaluation.protocols import metrics
from cirloop.types import ImageId, LabeledQueries, Preference, Query, QueryId, Relevance
from cirloop.validation import ValidationReport

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "hp_fashioniq"


def path(image: str, category: str = "shirt") -> str:
    return f"/-/image_data/{category}/{image}.jpg"


def content() -> dict[str, Any]:
    """Two questions of one user."""
    shown = [
        {"img_path": [path(f"{place}{n}") for n in range(5)], "user_score": "3"} for place in "ab"
    ]
    return {
        "user_1": {
            "question_set_1": {
                "ref_img_paths": [path("r0"), path("r1", "toptee")],
                "targ_img_paths": [path("a0"), path("b0")],
                "sentences": ["is reddotmark  and has dots", "is darker"],
                "retrieved_set1": [shown[0], shown[0]],
                "retrieved_set2": [shown[1], shown[1]],
                "preferred set": ["1", "2"],
            }
        }
    }


def read(directory: Path, what: Any) -> tuple[LabeledQueries, dict[ImageId, str], str]:
    """Read the questions, the categories, and what is wrong."""
    (directory / "hpfiq.json").write_text(what if isinstance(what, str) else json.dumps(what))
    problems = ValidationReport()
    part, categories = load_queries(directory, "hpfiq.json", problems)
    return part, categories, "\n".join(f"{row.where}: {row.what}" for row in problems.rows)


@pytest.mark.parametrize(
    ("sentence", "text"),
    [
        (
            "is blue in colordotmark  and has no sleevesdotmark",
            "Is blue in color and has no sleeves",
        ),
        ("looks like a hondaquestionmark  and is green", "Looks like a honda and is green"),
        ("black andmark white  and blackandmarkwhite", "Black & white and black&white"),
        ("shows a landmark  and has Landmarks", "Shows a landmark and has Landmarks"),
        ("has one starmark star", "Has one * star"),
        ("more formal", "More formal"),
        ("is v. neck dotmark two", "Is v. neck . two"),
        ("dotmark", ""),
    ],
)
def test_marks_are_turned_back(sentence: str, text: str) -> None:
    assert restore_captions(sentence) == text


def test_a_question_becomes_a_query(tmp_path: Path) -> None:
    part, categories, wrong = read(tmp_path, content())
    assert wrong == ""
    assert [(q.id, q.reference, q.text) for q in part.queries] == [
        ("user_1/question_set_1/0", "r0", "Is red and has dots"),
        ("user_1/question_set_1/1", "r1", "Is darker"),
    ]
    assert part.relevance is not None
    chosen = part.relevance.preferences[part.queries[1].id]
    assert chosen.first == ("a0", "a1", "a2", "a3", "a4") and chosen.preferred == 2
    assert categories["r1"] == "toptee" and part.gallery is not None and len(part.gallery.ids) == 12
    assert part.relevant_images(part.queries[0]) == {"r0", *chosen.first, *chosen.second}


def at(key: str, value: Any, number: int = 0) -> Callable[[dict[str, Any]], object]:
    return lambda c: c["user_1"]["question_set_1"][key].__setitem__(number, value)


def shown(number: int, **content: Any) -> Callable[[dict[str, Any]], object]:
    return at(f"retrieved_set{number}", content)


def field(key: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda c: c["user_1"]["question_set_1"].__setitem__(key, value)


TWICE = "holds an image more than once"
WRONG: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no users": (lambda c: c.clear(), "holds no users"),
    "user no object": (lambda c: c.update(user_1=[]), "user_1: must be an object"),
    "set no object": (
        lambda c: c["user_1"].update(question_set_1=3),
        "question_set_1: must be an object of lists",
    ),
    "list missing": (
        lambda c: c["user_1"]["question_set_1"].pop("sentences"),
        "has no 'sentences'",
    ),
    "list a word": (field("preferred set", "1"), "'preferred set' must be a list, found text"),
    "lists differ": (field("preferred set", ["1"]), "the lists differ in length"),
    "sentence a number": (at("sentences", 3), "'sentences' must be text, found a whole number"),
    "preferred 3": (at("preferred set", "3"), "'preferred set' must be '1' or '2', found '3'"),
    "set no object of paths": (
        at("retrieved_set1", []),
        "'retrieved_set1' must be an object, found a list",
    ),
    "set without paths": (shown(1), "retrieved_set1: has no 'img_path'"),
    "set empty": (shown(2, img_path=[]), "retrieved_set2: 'img_path' holds no images"),
    "image twice": (shown(2, img_path=[path("b0")] * 2), TWICE),
    "unknown category": (
        at("ref_img_paths", "/-/image_data/hat/x.jpg"),
        "does not end in <category>/<image>.jpg",
    ),
    "path a number": (at("ref_img_paths", 1), "'ref_img_paths' must be text, found a whole number"),
}


@pytest.mark.parametrize("sentence", [" ", "", "dotmark"])
def test_a_blank_sentence_is_a_query_like_any_other(sentence: str, tmp_path: Path) -> None:
    what = content()
    at("sentences", sentence)(what)
    part, _, wrong = read(tmp_path, what)
    assert wrong == "" and [q.text for q in part.queries] == ["", "Is darker"]


@pytest.mark.parametrize("name", WRONG)
def test_each_mistake_is_named(name: str, tmp_path: Path) -> None:
    change, message = WRONG[name]
    what = content()
    change(what)
    assert message in read(tmp_path, what)[2]


def test_all_mistakes_come_together(tmp_path: Path) -> None:
    what = content()
    for name in ("sentence a number", "set empty", "image twice"):
        WRONG[name][0](what)
    at("preferred set", "x", 1)(what)
    wrong = read(tmp_path, what)[2]
    assert "'sentences' must be text" in wrong and TWICE in wrong
    assert "question 1: 'preferred set' must be" in wrong


TEN_SCORES = st.lists(st.integers(-3, 3), min_size=10, max_size=10)


@given(st.lists(st.tuples(TEN_SCORES, st.sampled_from([1, 2])), min_size=1, max_size=9))
def test_both_numbers_are_their_definitions(rows: list[tuple[list[int], int]]) -> None:
    images = tuple(ImageId(str(n)) for n in range(10))
    queries = tuple(
        Query(QueryId(str(n)), ImageId(f"reference {n}"), "x") for n in range(len(rows))
    )
    chosen, scores = {}, {}
    for q, (row, preferred) in zip(queries, rows, strict=True):
        chosen[q.id] = Preference(images[:5], images[5:], preferred)
        scores[q.id] = dict(zip(images, map(float, row), strict=True))
    right = Relevance({}, preferences=chosen)
    part = LabeledQueries("hp_fashioniq_val", queries, right, None, hp_fashioniq.PROTOCOL)
    found = metrics([part], scores)
    above = [preferred == 1 for row, preferred in rows if sum(row[:5]) > sum(row[5:])]
    below = [preferred == 2 for row, preferred in rows if sum(row[:5]) < sum(row[5:])]
    tied = len(rows) - len(above) - len(below)
    agree = (sum(above) + sum(below) + tied / 2) / len(rows)
    assert found["symmetric accuracy"].value == pytest.approx(agree)
    assert ("preference rate" in found) == bool(above)
    if above:
        rate = sum(above) / len(above)
        assert found["preference rate"].value == pytest.approx(rate)
        assert found["preference rate"].se == pytest.approx((rate * (1 - rate) / len(above)) ** 0.5)


@pytest.mark.real_data
def test_the_real_file(tmp_path: Path) -> None:
    """The first 20 users. A score that knows nothing has a preference rate of the share of set 1,
    not one half."""
    if not REAL.is_dir():
        pytest.skip(f"the real annotations are not at {REAL}")
    problems = ValidationReport()
    part, categories = load_queries(REAL, "hpfiq_first20users.json", problems)
    assert not problems.rows and len(part.queries) == 1000 and part.relevance is not None
    assert set(categories.values()) == {"shirt", "toptee"}
    assert not any("mark" in query.text for query in part.queries if "landmark" not in query.text)
    assert sum(p.preferred == 1 for p in part.relevance.preferences.values()) == 533
    random = np.random.default_rng(0)
    scores = {
        q.id: {image: random.standard_normal() for image in part.relevant_images(q)}
        for q in part.queries
    }
    found = metrics([part], scores)
    assert abs(found["preference rate"].value - 0.533) < 4 * found["preference rate"].se
    assert abs(found["symmetric accuracy"].value - 0.5) < 4 * found["symmetric accuracy"].se
