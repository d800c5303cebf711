"""Files for the benchmarks' servers, checked against their rules before they are written.

CIRR: two JSON files, `"version": "rc2"`, `"metric": "recall"` with 50 image names per pairid and
`"recall_subset"` with 3, the reference left out, 5 MB at most. CIRCO: one JSON of 50 integer image
ids per query id. All queries, no image twice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from cirloop.artifacts.atomic import write_text
from cirloop.evaluation.rankings_file import preview
from cirloop.types import ImageId, LabeledQueries, QueryId, Rankings
from cirloop.validation import ValidationReport

LISTED = 50
SUBSET_LISTED = 3
CIRR_BYTES = 5_000_000
BENCHMARKS = ("cirr", "circo")
Files = dict[str, Mapping[str, object]]
"""Content by file name."""
Rows = dict[QueryId, Sequence[ImageId]]


def build(part: LabeledQueries, rankings: Rankings, problems: ValidationReport) -> Files:
    """Return the content of each file by its name, from rankings of 50 images or more.

    What the server would refuse is added to `problems`.
    """
    if part.name.startswith("circo"):
        return _circo(part, rankings, problems)
    return _cirr(part, rankings, problems)


def _circo(part: LabeledQueries, rankings: Rankings, problems: ValidationReport) -> Files:
    rows = {query.id: rankings[query.id] for query in part.queries}
    _check_lengths("submission", rows, LISTED, "images", problems)
    content: dict[str, object] = {}
    for query, row in rows.items():
        content[query] = [int(image) for image in row[:LISTED]]
    return {f"{part.name}.json": content}


def _cirr(part: LabeledQueries, rankings: Rankings, problems: ValidationReport) -> Files:
    without_reference: Rows = {}
    members: Rows = {}
    for query in part.queries:
        ranking = rankings[query.id]
        group = set(part.groups[query.id])
        without_reference[query.id] = [image for image in ranking if image != query.reference]
        members[query.id] = [image for image in ranking if image in group]
    _check_lengths("submission, recall", without_reference, LISTED, "images", problems)
    _check_lengths(
        "submission, recall_subset", members, SUBSET_LISTED, "images of their group", problems
    )
    files: Files = {
        f"{part.name}_recall.json": _cirr_file("recall", without_reference, LISTED),
        f"{part.name}_recall_subset.json": _cirr_file("recall_subset", members, SUBSET_LISTED),
    }
    for name, content in files.items():
        size = len(_text(content).encode())
        if size > CIRR_BYTES:
            problems.add(name, f"has {size:,} bytes, and the server takes {CIRR_BYTES:,}")
    return files


def _cirr_file(metric: str, rows: Rows, num_listed: int) -> dict[str, object]:
    content: dict[str, object] = {"version": "rc2", "metric": metric}
    for query, row in rows.items():
        content[query] = row[:num_listed]
    return content


def _check_lengths(
    where: str, rows: Rows, num_listed: int, noun: str, problems: ValidationReport
) -> None:
    short = [f"{query} ({len(row)})" for query, row in rows.items() if len(row) < num_listed]
    if short:
        problems.add(
            where, f"{len(short)} queries rank fewer than {num_listed} {noun}: {preview(short)}"
        )


def write(directory: Path, files: Files) -> list[Path]:
    """Write the files and return their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_text(directory / name, _text(content))
    return [directory / name for name in files]


def _text(content: Mapping[str, object]) -> str:
    return json.dumps(content, separators=(",", ":"))
