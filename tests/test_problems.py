"""Problems in one error: all of them are kept, and many of one cause are one line."""

from __future__ import annotations

import pytest

from cirloop.validation import ValidationFailed, ValidationReport


def test_many_of_one_cause_are_one_line_with_examples_and_their_count() -> None:
    problems = ValidationReport("Put the images right.")
    for number in range(19_250):
        problems.add(f"/data/cirr/train/{number}.png", "is not there")
    problems.add("/data/cirr/dev/x.png", "is empty")
    with pytest.raises(ValidationFailed) as caught:
        problems.raise_if_any()
    assert str(caught.value).splitlines() == [
        "19,251 problems:",
        (
            "  /data/cirr/train/0.png: is not there (19,249 more like it, such as"
            " /data/cirr/train/1.png)"
        ),
        "  /data/cirr/dev/x.png: is empty",
        "Put the images right.",
    ]
    assert len(caught.value.rows) == 19_251


@pytest.mark.parametrize(
    "what",
    [
        "reference 'a{}.png' is not in the gallery; did you mean 'b{}.png'?",
        'has an unknown field "it\'s {}"',
        "has {}x200 pixels",
        "is outside of the data directory: /somewhere/else {}/a.png",
        "is not JSON (Expecting value: line 1 column {} (char 0))",
    ],
)
def test_names_numbers_and_paths_do_not_make_another_cause(what: str) -> None:
    problems = ValidationReport()
    for number in range(9):
        problems.add(f"line {number}", what.replace("{}", str(number)))
    problems.add("line 10", "is another thing")
    with pytest.raises(ValidationFailed, match="8 more like it, such as line 1") as caught:
        problems.raise_if_any()
    assert len(str(caught.value).splitlines()) == 3


def test_each_field_that_entries_lack_is_named() -> None:
    problems = ValidationReport()
    for number in range(9):
        problems.add(f"entry {number}", "has no 'image'")
        problems.add(f"entry {number}", "has no 'text'")
    with pytest.raises(ValidationFailed) as caught:
        problems.raise_if_any()
    assert str(caught.value).splitlines()[1:] == [
        f"  entry 0: has no '{name}' (8 more like it, such as entry 1)"
        for name in ("image", "text")
    ]


def test_flags_are_each_named() -> None:
    problems = ValidationReport()
    for number in range(9):
        problems.add(f"--flag_{number}", "is needed")
    with pytest.raises(ValidationFailed) as caught:
        problems.raise_if_any()
    assert all(f"--flag_{number}: is needed" in str(caught.value) for number in range(9))
