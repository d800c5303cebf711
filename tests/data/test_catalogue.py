"""Catalogues: texts are written for what changes, read back to it, and learned from human texts."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cirloop.data.catalogue import (
    AttributeCatalogue,
    Items,
    Phrase,
    Phrasebook,
    changed,
    changes,
    learn_phrases,
    read_items,
    read_phrases,
)
from cirloop.types import ImageId, Query, QueryId, Triplet, UserError
from tests.commands import ROOT

JUICE = {"product": "juice", "brand": "Bravo", "flavour": "orange", "organic": "no"}
PHRASES = """
brand: ["the same {product} by {brand}", "{brand} instead of {old brand}."]
flavour: ["with {flavour}", "{flavour}"]
organic=yes: [the organic one]
organic=no: [one that is not organic]
organic=: [nothing said of organic]
brand, flavour: ["{flavour} by {brand}"]
organic=yes, brand: ["{brand}, organic"]
"""
WORDS = ("red", "and", "Yellow", "by", "with", "one", "instead", "of", "organic", "A.", "it's")
VALUES = st.lists(st.sampled_from(WORDS), min_size=1, max_size=3).map(" ".join)
ATTRIBUTES = st.fixed_dictionaries(
    {"product": st.just("juice"), "brand": VALUES, "flavour": VALUES},
    optional={"organic": st.sampled_from(("yes", "no"))},
)


@pytest.fixture(scope="session")
def phrasebook(tmp_path_factory: pytest.TempPathFactory) -> Phrasebook:
    file = tmp_path_factory.mktemp("phrases") / "phrases.yaml"
    file.write_text(PHRASES)
    return read_phrases(file)


def says(phrasebook: Phrasebook, text: str, reference: dict[str, str]) -> list[dict[str, str]]:
    """What images of all readings have."""
    return [changed(reference, reading) for reading in phrasebook.read(text, reference)]


def triplet(text: str, reference: str = "a/1.jpg", target: str = "b/1.jpg") -> Triplet:
    return Triplet(Query(QueryId(text), ImageId(reference), text), ImageId(target))


def phrase(text: str, **said: str | None) -> Phrase:
    return Phrase(text, tuple(said.items()))


def items(**target: str | None) -> Items:
    """JUICE in the folder `a`, and JUICE with changes in `b`."""
    return Items({"a": JUICE, "b": changed(JUICE, target)})


@given(ATTRIBUTES, ATTRIBUTES)
def test_changes_lead_from_one_to_the_other(
    reference: dict[str, str], target: dict[str, str]
) -> None:
    delta = changes(reference, target)
    assert changes(changed(reference, delta), target) == {}
    assert all(reference.get(name) != target.get(name) for name in delta)


def test_case_and_spaces_of_values_are_no_change() -> None:
    assert changes(JUICE, {**JUICE, "brand": " bravo "}) == {}
    assert changes(JUICE, {"product": "juice", "brand": "X"}) == {
        "brand": "X",
        "flavour": None,
        "organic": None,
    }


@given(ATTRIBUTES, ATTRIBUTES, st.integers(0, 9))
def test_a_written_text_is_read_back(
    phrasebook: Phrasebook, reference: dict[str, str], target: dict[str, str], seed: int
) -> None:
    delta = changes(reference, target)
    text = phrasebook.write(reference, target, random.Random(seed))
    assert (text is None) == (not delta)
    if text is not None:
        assert delta in phrasebook.read(text, reference)
        shouted = f"  {text.upper().replace(' ', '  ')}. "
        assert any(not changes(read, target) for read in says(phrasebook, shouted, reference))
        assert changes(reference, reference) not in phrasebook.read(text, reference)


def test_a_phrase_for_exactly_these_changes_goes_before_joined_ones(
    phrasebook: Phrasebook,
) -> None:
    def texts(**new: str) -> set[str | None]:
        target = {**JUICE, **new}
        return {phrasebook.write(JUICE, target, random.Random(seed)) for seed in range(60)}

    assert texts(brand="Zest") == {"the same juice by Zest", "Zest instead of Bravo"}
    assert texts(brand="Zest", flavour="red and yellow") == {"red and yellow by Zest"}
    joined = {f"the organic one and {words}" for words in ("with plum", "plum")}
    joined |= {f"{words} and the organic one" for words in ("with plum", "plum")}
    assert texts(flavour="plum", organic="yes") == joined
    assert texts(brand="Zest", organic="yes") == {"Zest, organic"}
    assert texts(product="soap") == {None}  # no words for it
    assert texts(product="soap", flavour="plum") == {None}
    assert texts(product="soap", brand="Zest") == {None}


def test_a_kept_slot_is_of_what_does_not_change() -> None:
    book = Phrasebook(
        (
            Phrase("the same {product} by {brand}", (("brand", None),)),
            Phrase("a {product}, not {old product}", (("product", None),)),
        )
    )
    both = {**JUICE, "product": "soap", "brand": "Zest"}
    assert book.write(JUICE, both, random.Random(0)) is None
    assert book.read("the same soap by Zest", JUICE) == []
    assert book.read("the same soap by Zest and a soap, not juice", JUICE) == []
    assert book.read("the same juice by Zest and a soap, not juice", JUICE) == [
        {"brand": "Zest and a soap, not juice"}
    ]
    assert book.read("the same juice by Bravo", JUICE) == []  # it is that already
    assert book.read("a soap, not milk", JUICE) == []
    assert book.write({"brand": "Bravo"}, {"brand": "Zest"}, random.Random(0)) is None


def test_stops_and_odd_signs_of_a_phrase_are_read(phrasebook: Phrasebook) -> None:
    for text in ("by {brand} .", "\0 {brand}.", "İ, Σ {brand}, Σ"):
        book = Phrasebook((Phrase(text, (("brand", None),)),))
        written = book.write(JUICE, {**JUICE, "brand": "ΣΟΣ"}, random.Random(0)) or ""
        assert book.read(written, JUICE) == [{"brand": "ΣΟΣ"}]
        assert book.read(f"{written} .", JUICE)[-1] == {"brand": "ΣΟΣ"}


def test_a_slot_that_comes_twice_has_one_value() -> None:
    book = Phrasebook((Phrase("{brand}, yes {brand}", (("brand", None),)),))
    assert book.read("Zest, yes zest", JUICE) == [{"brand": "Zest"}]
    assert book.read("Zest, yes Bravo", JUICE) == []


@pytest.mark.parametrize(
    ("text", "said", "problem"),
    [
        ("the other one", (("brand", None),), r"must have the slot \{brand\}, or .* brand=VALUE"),
        ("without {brand}", (("brand", ""),), "names no value"),
        ("another {brand}", (("brand", "*"),), "names no value"),
        ("{brand", (("brand", None),), "a brace that is no slot's"),
        (" ", (("brand", "Zest"),), "is empty"),
        (".", (("brand", "Zest"),), "is empty"),
        ("a", (), "must change attributes"),
        ("{brand}", (("brand", None), ("brand", "Zest")), "each of them once"),
    ],
)
def test_a_phrase_and_its_changes_go_together(
    text: str, said: tuple[tuple[str, str | None], ...], problem: str
) -> None:
    with pytest.raises(UserError, match=problem):
        Phrase(text, said)


@pytest.mark.parametrize(
    ("text", "target", "learned"),
    [
        ("Same juice by Zest.", {"brand": "Zest"}, phrase("Same {product} by {brand}", brand=None)),
        ("zest, not bravo", {"brand": "Zest"}, phrase("{brand}, not {old brand}", brand=None)),
        ("organic, no sugar", {"organic": "yes"}, phrase("organic, no sugar", organic="yes")),
        ("says nothing", {"organic": None}, phrase("says nothing", organic="")),
        (
            "red and yellow instead of orange",
            {"flavour": "red and yellow", "brand": "yellow"},
            phrase("{flavour} instead of {old flavour}", brand="yellow", flavour=None),
        ),
        ("oranges by Zest", {"brand": "Zest"}, phrase("oranges by {brand}", brand=None)),
        (
            "ORANGE and red grapefruit",
            {"flavour": "orange and red grapefruit"},
            phrase("{flavour}", flavour=None),
        ),
    ],
)
def test_phrases_are_learned_from_human_texts(
    text: str, target: dict[str, str | None], learned: Phrase
) -> None:
    assert learn_phrases([triplet(text)], items(**target)).phrases == (learned,)


@given(ATTRIBUTES, ATTRIBUTES, st.integers(0, 9))
def test_what_was_written_can_be_learned(
    phrasebook: Phrasebook, reference: dict[str, str], target: dict[str, str], seed: int
) -> None:
    text = phrasebook.write(reference, target, random.Random(seed))
    if text is not None:
        known = Items({"a": reference, "b": target})
        learned = learn_phrases([triplet(text)], known)
        assert AttributeCatalogue(known, learned).is_true(
            ImageId("a/1.jpg"), text, ImageId("b/1.jpg")
        )


def test_where_nothing_is_learned_the_reasons_are_counted() -> None:
    triplets = [
        triplet("by Zest", "c/1.jpg"),
        triplet("by Zest", target="c/1.jpg"),
        triplet("another one", target="a/2.jpg"),
        triplet("{this}"),
        triplet("{that}"),
        triplet("."),
    ]
    with pytest.raises(UserError) as error:
        learn_phrases(triplets, items(brand="Zest"))
    said = str(error.value)
    for part in (
        "from the human texts of 6 triplets",
        "an image is not in the catalogue: 2",
        "reference and target have equal attributes: 1",
        "the text cannot be read back to what changes: 3",
        "--foundation.phrases FILE",
    ):
        assert part in said
    with pytest.raises(UserError, match=r"of 0 triplets \(none is there\)"):
        learn_phrases([], items(brand="Zest"))


def test_an_image_has_its_own_entry_or_that_of_its_innermost_folder() -> None:
    known = Items({"a": {"n": "1"}, "a/b": {"n": "2"}, "a/b/own.jpg": {"n": "3"}})
    shown = {
        "a/x.jpg": "1",
        "a/b/x.jpg": "2",
        "a/b/c/x.jpg": "2",
        "a/b/own.jpg": "3",
        "ab/x.jpg": None,
        "x.jpg": None,
    }
    for image, number in shown.items():
        assert (known.attributes(ImageId(image)) or {}).get("n") == number


def test_a_catalogue_writes_what_it_calls_true(phrasebook: Phrasebook) -> None:
    brands = ("Bravo", "Zest", "Sol")
    flavours = ("orange", "plum", "red and yellow")
    known = Items(
        {
            f"{brand}/{flavour}/{organic}": {
                "product": "juice",
                "brand": brand,
                "flavour": flavour,
                "organic": organic,
            }
            for brand in brands
            for flavour in flavours
            for organic in ("yes", "no")
        }
    )
    catalogue = AttributeCatalogue(known, phrasebook)
    images = [ImageId(f"{folder}/1.jpg") for folder in known.entries]
    for reference in images:
        for image in images:
            distance = len(
                changes(known.attributes(reference) or {}, known.attributes(image) or {})
            )
            text = catalogue.write(reference, image, 3)
            assert (text is not None) == (1 <= distance <= 2)
            if text is not None:
                assert [i for i in images if catalogue.is_true(reference, text, i)] == [image]
            assert (catalogue.limited(1).write(reference, image, 3) is None) == (distance != 1)
    stranger = ImageId("soap.jpg")
    assert not catalogue.knows(stranger) and catalogue.knows(images[0])
    assert catalogue.write(images[0], stranger, 0) is None
    assert catalogue.write(stranger, images[0], 0) is None
    assert not catalogue.is_true(stranger, "the organic one", images[0])
    texts = {catalogue.write(images[0], images[2], seed) for seed in range(20)}
    assert len(texts) == 2 and catalogue.write(images[0], images[2], 1) in texts


def test_a_fingerprint_is_of_entries_phrases_and_limit(phrasebook: Phrasebook) -> None:
    one = AttributeCatalogue(items(), phrasebook)
    others = [
        AttributeCatalogue(items(brand="Zest"), phrasebook),
        AttributeCatalogue(items(), Phrasebook(phrasebook.phrases[1:])),
        one.limited(3),
    ]
    assert one.fingerprint == AttributeCatalogue(items(), phrasebook).fingerprint
    assert len({one.fingerprint, *(other.fingerprint for other in others)}) == 4


@pytest.mark.parametrize("name", ["items.json", "items.yaml", "classes.json", "classes.yml"])
def test_entries_are_read_from_json_and_yaml(tmp_path: Path, name: str) -> None:
    entries = {"a/b/": {"brand": "  Bravo  Sol", "organic": "yes"}, "cafe\u0301.jpg": {"size": "1"}}
    content = {"classes": entries, "note": "of a shop"} if "classes" in name else entries
    text = json.dumps(content)
    if "json" not in name:
        text = text.replace('"yes"', "yes").replace('"1"', "1")
    (tmp_path / name).write_text(text)
    assert read_items(tmp_path / name) == {
        "a/b": {"brand": "Bravo Sol", "organic": "yes"},
        "café.jpg": {"size": "1"},
    }


def test_the_documented_files_write_and_judge(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "catalogue.md").read_text("utf-8")
    blocks = re.findall(r"^```(json|yaml)\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    files = {"items.json": blocks[1][1], "phrases.yaml": blocks[2][1]}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    entries = read_items(tmp_path / "items.json")
    catalogue = AttributeCatalogue(Items(entries), read_phrases(tmp_path / "phrases.yaml"))
    first, second, third = (ImageId(f"{folder}/1.jpg") for folder in entries)
    texts = {catalogue.write(first, second, seed) for seed in range(20)}
    assert texts == {"the same juice by Zest", "Zest instead of Bravo"}
    text = catalogue.write(second, third, 0)
    assert text in (
        "with red and yellow and the organic one",
        "the organic one and with red and yellow",
    )
    assert catalogue.is_true(second, text or "", third)
    assert catalogue.write(first, third, 0) is None  # they differ in three attributes
    assert catalogue.limited(3).is_true(
        first, catalogue.limited(3).write(first, third, 0) or "", third
    )


@pytest.mark.parametrize(
    ("name", "content", "problems"),
    [
        ("a.json", "{", ["is not JSON"]),
        ("a.yaml", "a: [", ["is not YAML"]),
        ("a.csv", "a,b", ["is neither a .json nor a .yaml file"]),
        ("a.json", "[1]", ["must be an object with an entry for each image or folder"]),
        ("a.json", "{}", ["must be an object with an entry"]),
        ("a.yaml", "", ["must be an object with an entry"]),
        ("a.json", '{"a": 1, "b": {}}', ["'a': must be an object of attr", "'b': must be an obj"]),
        ("a.json", '{"a": {"n": "1"}, "a/": {"n": "2"}}', ["'a/': is there more than once"]),
        ("a.json", '{" ": {"n": "1"}}', ["names nothing"]),
        (
            "a.json",
            '{"a": {"n": 1, "m": " ", "old k": "1", "x=y": "1", "": "1"}}',
            [
                "'n' must be a text in quotes",
                "'m' must be",
                "'old k' must have",
                "'x=y' must",
                "''",
            ],
        ),
    ],
)
def test_all_that_is_wrong_with_entries_is_said(
    tmp_path: Path, name: str, content: str, problems: list[str]
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as error:
        read_items(tmp_path / name)
    for problem in (*problems, str(tmp_path / name), '{"image or folder": {"attribute":'):
        assert problem in str(error.value)


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    for read, name in ((read_items, "a.json"), (read_items, "a.yaml"), (read_phrases, "p.yaml")):
        with pytest.raises(UserError, match=f"{name}: there is no such file"):
            read(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "problems"),
    [
        ("- a", ["must hold phrases by the attributes that they change"]),
        ("", ["must hold phrases"]),
        ("a: [", ["is not YAML"]),
        ("brand: by {brand}\n", ["'brand': must hold a list of phrases"]),
        ("brand: []\n", ["'brand': must hold a list of phrases"]),
        ("brand: [[a]]\n", ["'brand': must hold texts only"]),
        ("'brand,': ['{brand}']\n=yes: [a]\n", ["'brand,': is no list", "'=yes': is no list"]),
        (
            "brand: [the other one, '{brand}', '{x']\n",
            ["'the other one' must have the slot {brand}", "'{x' has a brace"],
        ),
    ],
)
def test_all_that_is_wrong_with_phrases_is_said(
    tmp_path: Path, content: str, problems: list[str]
) -> None:
    file = tmp_path / "phrases.yaml"
    file.write_text(content)
    with pytest.raises(UserError) as error:
        read_phrases(file)
    for problem in (*problems, str(file), "Phrases are a YAML file such as"):
        assert problem in str(error.value)
