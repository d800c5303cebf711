"""A blank text in an official file, as CIRR's test1 has one, is a query like any other and is said
once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cirloop.data import circo, cirr, fashioniq, splits
from cirloop.evaluation import submission
from cirloop.types import LabeledQueries
from cirloop.validation import ValidationReport
from tests.fake_datasets import write_circo, write_cirr, write_fashioniq

Official = tuple[Path, Callable[[ValidationReport], list[LabeledQueries]]]
"""A file, and what reads its data set."""


def blank(path: Path, field: str, value: object, entry: int = 2) -> None:
    entries = json.loads(path.read_text())
    entries[entry][field] = value
    path.write_text(json.dumps(entries))


def of_cirr(directory: Path) -> Official:
    path = write_cirr(directory, 1) / "captions" / "cap.rc2.test1.json"
    blank(path, "caption", " ")
    return path, lambda problems: cirr.load_queries(directory, "test", problems)


def of_circo(directory: Path) -> Official:
    path = write_circo(directory, 1) / "annotations" / "test.json"
    blank(path, "relative_caption", " ")
    return path, lambda problems: circo.load_queries(directory, "test", problems)


def of_fashioniq(directory: Path) -> Official:
    path = write_fashioniq(directory, 1) / "captions" / "cap.dress.val.json"
    blank(path, "captions", ["", " ."])
    return path, lambda problems: fashioniq.load_queries(directory, "val", problems, ("dress",))


@pytest.mark.parametrize("official", [of_cirr, of_circo, of_fashioniq])
def test_a_blank_text_is_kept_and_said_once(
    official: Callable[[Path], Official], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    splits.warn_once.cache_clear()
    path, read = official(tmp_path)
    problems = ValidationReport()
    [part] = read(problems)
    read(problems)
    assert not problems.rows and len(part.queries) == len(json.loads(path.read_text()))
    assert part.queries[2].text.strip() == ""
    assert [r.getMessage().count("blank texts: 1 (") for r in caplog.records] == [1]


def test_a_submission_holds_the_query_with_the_blank_text(tmp_path: Path) -> None:
    path, read = of_cirr(tmp_path)
    [part] = read(ValidationReport())
    assert part.gallery is not None
    rankings = {query.id: part.gallery.ids for query in part.queries}
    files = submission.build(part, rankings, ValidationReport())
    pairs = {str(entry["pairid"]) for entry in json.loads(path.read_text())}
    assert all(pairs < set(content) for content in files.values()) and len(files) == 2
