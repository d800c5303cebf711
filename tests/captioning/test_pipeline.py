"""From candidates to augmented triplets: named checks, the surest kept, nothing lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cirloop.captioning import CaptioningSettings
from cirloop.captioning.base import Answer
from cirloop.captioning.pipeline import (
    Candidate,
    check_format,
    check_round_trip,
    generate_candidates,
    select,
)
from cirloop.captioning.prompts import REWRITE
from cirloop.data.known_positives import normal_text
from cirloop.types import AugmentedTriplet, ImageId, MinedNegative, Query, QueryId

SETTINGS = CaptioningSettings(min_words=2, max_words=5, max_round_trip_rank=3, max_per_query=2)


def candidate(
    text: str = "make it red",
    *,
    query: str = "q",
    image: str = "i",
    verify: float | None = None,
    reason: str = "",
) -> Candidate:
    """A candidate for image `image`, mined for query `query` about reference `ref of <query>`."""
    negative = MinedNegative(QueryId(query), ImageId(image), 1, 0.5, 2, 0.4, "top_k")
    checks = {} if verify is None else {"verify": verify}
    return Candidate(negative, ImageId(f"ref of {query}"), "make it blue", text, reason, checks)


CHANGE = "The change from picture 1 to picture 2 is"


@pytest.mark.parametrize(
    ("text", "kept", "reason"),
    [
        ("make it red", "make it red", ""),
        ("  make \t it  red ", "make it red", ""),
        ('"make it red"', "make it red", ""),
        ("one two", "one two", ""),
        ("one two three four five", "one two three four five", ""),
        ("", "", "unparseable"),
        ('  "" ', "", "unparseable"),
        ("make it\nred", "make it red", "unparseable"),
        ("<|im_end|> make it red", "<|im_end|> make it red", "unparseable"),
        ("{text} is red", "{text} is red", "unparseable"),
        ("[red] circle", "[red] circle", "unparseable"),
        ("make it blue", "make it blue", "same as the original text"),
        (" Make it  BLUE.", "Make it BLUE.", "same as the original text"),
        ("red", "red", "too short"),
        ("none", "none", "declined"),
        (' "None." ', "None.", "declined"),
        ("one two three four five six", "one two three four five six", "too long"),
        ("The change from picture 1 to picture 2 is that it is red", "it is red", ""),
        ("Sure! Here is the rewritten text:\n\nmake it red", "make it red", ""),
        ('Certainly! The modified text is: "make it red"', "make it red", ""),
        ("**Modified text:** make it red", "make it red", ""),
        ("Here's a short description of the change: make it red", "make it red", ""),
        ("THE DIFFERENCE BETWEEN THE TWO IMAGES IS a red hat", "a red hat", ""),
        ("Sure, make it blue", "make it blue", "same as the original text"),
        ("The main change is none.", "none.", "declined"),
        ("Sure! Here is", "Sure! Here is", "set phrase"),
        (CHANGE, CHANGE, "set phrase"),
        ("make it red. Let me know if", "make it red. Let me know if", "set phrase"),
        ("I'm sorry, it is red", "I'm sorry, it is red", "set phrase"),
        ("this is red", "this is red", ""),
        ("the text is red", "the text is red", ""),
        ("here is a red hat", "here is a red hat", ""),
        ("great white shark instead", "great white shark instead", ""),
        ("great, big dog", "great, big dog", ""),
        ("the caption is in white", "the caption is in white", ""),
        ("The sentence is longer", "The sentence is longer", ""),
        ("The sentence is: make it red", "make it red", ""),
        ("The modified caption is make it red", "make it red", ""),
    ],
)
def test_form_is_checked_by_name(text: str, kept: str, reason: str) -> None:
    checked = check_format(candidate(text), SETTINGS)
    assert (checked.text, checked.reason) == (kept, reason)
    assert replace(checked, text=text, reason="") == candidate(text)


def test_an_answer_that_had_not_ended_is_cut_off_and_kept_as_it_is() -> None:
    class Scripted:
        name = "scripted"

        def generate(self, *_: Any) -> list[list[Answer]]:
            return [[Answer("make it", ended=False), *[Answer("make it red", ended=True)] * 2]]

    mined, query = candidate().negative, Query(QueryId("q"), ImageId("ref of q"), "make it blue")
    rows = generate_candidates(Scripted(), [mined], {query.id: query}, SETTINGS, 0)  # type: ignore[arg-type]
    checked = [check_format(row, SETTINGS) for row in rows]
    reasons = [(row.text, row.reason) for row in checked]
    assert reasons == [("make it", "cut off"), ("make it red", "")]


def chosen(
    candidates: Sequence[Candidate], known: set[tuple[ImageId, str]] | None = None
) -> dict[str, str]:
    """Reason per text, empty where it was accepted."""
    accepted, rejected = select(candidates, known or set(), SETTINGS, 1, "tiny")
    return {a.triplet.query.text: "" for a in accepted} | {c.text: c.reason for c in rejected}


def test_a_text_that_is_there_but_for_spaces_and_a_full_stop_is_a_duplicate() -> None:
    known = {(ImageId("ref of q"), normal_text("Make  it red."))}
    assert chosen([candidate("make it red")], known) == {"make it red": "duplicate"}


def test_a_query_has_room_for_so_many_texts_of_all_iterations() -> None:
    settings = SETTINGS.model_copy(update={"max_per_query": 2, "max_per_query_in_all": 3})
    rows = [candidate(f"text {n}", image=f"i{n}") for n in range(3)]
    for num_before, num_accepted in ((0, 2), (2, 1), (3, 0), (4, 0)):
        before = Counter({QueryId("q"): num_before})
        accepted, rejected = select(rows, set(), settings, 2, "tiny", before)
        assert len(accepted) == num_accepted
        assert {row.reason for row in rejected} == {"enough for this query"}


A, B, C = "a b", "c d", "e f"
LESS_SURE, ENOUGH = "a surer text was kept", "enough for this query"
OF_ONE_IMAGE: dict[str, tuple[list[Candidate], dict[str, str]]] = {
    "the surest": (
        [candidate(A, verify=0.6), candidate(B, verify=0.9), candidate(C, verify=0.7)],
        {A: LESS_SURE, B: "", C: LESS_SURE},
    ),
    "of equally sure ones the first": (
        [candidate(A, verify=0.6), candidate(B, verify=0.6)],
        {A: "", B: LESS_SURE},
    ),
    "of unjudged ones the first": ([candidate(A), candidate(B)], {A: "", B: LESS_SURE}),
    "never a rejected one, however sure": (
        [candidate(A, verify=0.9, reason="round trip"), candidate(B, verify=0.6)],
        {A: "round trip", B: ""},
    ),
    # a second target for one query would be a contradiction, in any case of letters
    "and of another image in other letters": (
        [candidate(A, image="i", verify=0.8), candidate("A B", image="j", verify=0.9)],
        {"A B": "", A: "duplicate"},
    ),
}


@pytest.mark.parametrize("name", OF_ONE_IMAGE)
def test_one_text_is_kept(name: str) -> None:
    texts, reasons = OF_ONE_IMAGE[name]
    assert chosen(texts) == reasons


def test_surest_images_of_a_query_are_kept_up_to_the_limit() -> None:
    sure = enumerate((0.6, 0.9, 0.7, 0.8))
    texts = [candidate(f"text {n}", image=f"i{n}", verify=v) for n, v in sure]
    assert chosen(texts) == {"text 0": ENOUGH, "text 1": "", "text 2": ENOUGH, "text 3": ""}
    others = [candidate(f"other {n}", query="p", image=f"i{n}") for n in range(2)]
    both = chosen([*texts, *others])
    assert both["other 0"] == both["other 1"] == "", "the limit is per query"


def test_known_text_is_a_duplicate_and_the_next_best_is_kept() -> None:
    texts = [candidate("A b", verify=0.9), candidate("c d", verify=0.6)]
    assert chosen(texts, {(ImageId("ref of q"), "a b")}) == {"A b": "duplicate", "c d": ""}
    assert chosen(texts, {(ImageId("ref of p"), "a b")})["A b"] == ""


def test_accepted_row_says_where_it_comes_from() -> None:
    accepted, _ = select([candidate(verify=0.9)], set(), SETTINGS, 3, "tiny")
    (row,) = accepted
    assert row.triplet.query == Query(QueryId("q+3.1"), ImageId("ref of q"), "make it red")
    assert (row.triplet.target, row.source, row.iteration) == ("i", "q", 3)
    assert (row.captioner, row.prompt, row.checks) == ("tiny", REWRITE.name, {"verify": 0.9})


@st.composite
def many(draw: st.DrawFn) -> list[Candidate]:
    return [
        candidate(
            draw(st.sampled_from(("a b", "A b", "c d", "e f", "g h"))),
            query=draw(st.sampled_from("pqr")),
            image=draw(st.sampled_from("ijkl")),
            verify=draw(st.sampled_from((None, 0.5, 0.6, 0.9))),
            reason=draw(st.sampled_from(("", "", "", "too long"))),
        )
        for _ in range(draw(st.integers(0, 25)))
    ]


@given(candidates=many(), limit=st.integers(1, 3))
def test_every_candidate_is_accepted_or_rejected_for_a_reason(
    candidates: list[Candidate], limit: int
) -> None:
    settings = CaptioningSettings(max_per_query=limit)
    known = {(ImageId("ref of p"), "g h")}
    accepted, rejected = select(candidates, known, settings, 2, "tiny")
    assert len(accepted) + len(rejected) == len(candidates)
    assert all(c.reason for c in rejected)

    def key(c: Candidate) -> tuple[object, ...]:
        return c.negative.query, c.negative.image, c.text, c.checks.get("verify")

    def key_of_accepted(a: AugmentedTriplet) -> tuple[object, ...]:
        return a.source, a.triplet.target, a.triplet.query.text, a.checks.get("verify")

    keys = [*map(key_of_accepted, accepted), *map(key, rejected)]
    assert Counter(keys) == Counter(map(key, candidates))
    ids = [a.triplet.query.id for a in accepted]
    assert len(set(ids)) == len(ids)
    said = [(a.triplet.query.reference, a.triplet.query.text.casefold()) for a in accepted]
    assert len(set(said)) == len(said) and known.isdisjoint(said)
    assert len({(a.source, a.triplet.target) for a in accepted}) == len(accepted)
    assert max(Counter(a.source for a in accepted).values(), default=0) <= limit
    for c in rejected:
        sure = c.checks.get("verify", 0)
        if c.reason == "a surer text was kept":
            pair = (c.negative.query, c.negative.image)
            same = [a for a in accepted if (a.source, a.triplet.target) == pair]
            assert same and same[0].checks.get("verify", 0) >= sure
        elif c.reason == "enough for this query":
            best = [a.checks.get("verify", 0) for a in accepted if a.source == c.negative.query]
            assert len(best) == limit and min(best) >= sure


def test_round_trip_asks_about_accepted_candidates_only_and_keeps_ranks_within_the_limit() -> None:
    asked: list[tuple[str, str, str]] = []

    def ranks(queries: Sequence[Query], images: Sequence[ImageId]) -> list[int]:
        asked.extend((q.reference, q.text, image) for q, image in zip(queries, images, strict=True))
        return [3, 4]

    candidates = [
        candidate("a b", image="i", verify=0.7),
        candidate("c d", image="j", reason="too long"),
        candidate("e f", image="k"),
    ]
    first, second, third = check_round_trip(candidates, SETTINGS, ranks)
    assert asked == [("ref of q", "a b", "i"), ("ref of q", "e f", "k")]
    assert (first.reason, first.checks) == ("", {"verify": 0.7, "round_trip_rank": 3})
    assert second == candidates[1]
    assert (third.reason, third.checks) == ("round trip", {"round_trip_rank": 4})


def test_round_trip_refuses_an_answer_of_the_wrong_length() -> None:
    with pytest.raises(ValueError, match="shorter"):
        check_round_trip([candidate(), candidate("c d")], SETTINGS, lambda queries, images: [1])


def test_row_of_a_rejected_candidate_says_all_that_is_known() -> None:
    row = candidate("a b", verify=0.2, reason="not verified").row()
    assert row == {
        "source": "q",
        "reference": "ref of q",
        "image": "i",
        "original_text": "make it blue",
        "text": "a b",
        "reason": "not verified",
        "checks": {"verify": 0.2},
    }


def test_a_rewritten_triplet_keeps_its_querys_category() -> None:
    """Some prompt formats read it."""
    asked: list[str | None] = []

    def ranks(queries: Sequence[Query], images: Sequence[ImageId]) -> list[int]:
        asked.extend(query.category for query in queries)
        return [1] * len(images)

    dress = replace(candidate(verify=0.9), category="dress")
    (checked,) = check_round_trip([dress], SETTINGS, ranks)
    (accepted,), _ = select([checked], set(), SETTINGS, 1, "someone")
    assert asked == ["dress"] and accepted.triplet.query.category == "dress"
