"""Files for the benchmarks' servers, checked against their rules before they are written.

CIRR: two JSON files, `"version": "rc2"`, `"metric": "recall"` with 50 image names per pairid and
`"recall_subset"` with 3, the reference left out, 5 MB at most. CIRCO: one JSON of 50 integer image
ids per query id. All queries, no image twice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cirloop.artifacts.store import write_text
from cirloop.evaluation.rankings_file import some
from cirloop.types import ImageId, LabeledQueries, QueryId
from cirloop.validation import Problems

LISTED = 50
SUBSET_LISTED = 3
CIRR_BYTES = 5_000_000
BENCHMARKS = ("cirr", "circo")


def submission(
    part: LabeledQueries, rankings: Mapping[QueryId, Sequence[ImageId]], problems: Problems
) -> dict[str, dict[str, Any]]:
    """File name -> content, from rankings of 50 images or more. Adds what the server would refuse
    to `problems`."""
    short: list[str] = []

    def best(query: QueryId, images: Sequence[ImageId], count: int) -> Sequence[ImageId]:
        if len(images) < count:
            short.append(f"{query} ({len(images)})")
        return images[:count]

    if part.name.startswith("circo"):
        files: dict[str, dict[str, Any]] = {f"{part.name}.json": {}}
        for query in part.queries:
            images = best(query.id, rankings[query.id], LISTED)
            files[f"{part.name}.json"][query.id] = [int(image) for image in images]
        if short:
            problems.add(
                "submission", f"{len(short)} queries rank fewer than {LISTED} images: {some(short)}"
            )
        return files
    recall: dict[str, Any] = {"version": "rc2", "metric": "recall"}
    subset: dict[str, Any] = {"version": "rc2", "metric": "recall_subset"}
    for query in part.queries:
        others = [image for image in rankings[query.id] if image != query.reference]
        recall[query.id] = best(query.id, others, LISTED)
    if short:
        problems.add(
            "submission, recall",
            f"{len(short)} queries rank fewer than {LISTED} images: {some(short)}",
        )
        short.clear()
    for query in part.queries:
        members = {*part.groups[query.id]}
        subset[query.id] = best(
            query.id, [i for i in rankings[query.id] if i in members], SUBSET_LISTED
        )
    if short:
        what = (
            f"{len(short)} queries rank fewer than {SUBSET_LISTED} images of their group:"
            f" {some(short)}"
        )
        problems.add("submission, recall_subset", what)
    files = {f"{part.name}_recall.json": recall, f"{part.name}_recall_subset.json": subset}
    for name, rows in files.items():
        size = len(_text(rows).encode())
        if size > CIRR_BYTES:
            problems.add(name, f"has {size:,} bytes, and the server takes {CIRR_BYTES:,}")
    return files


def write(directory: Path, files: Mapping[str, Mapping[str, Any]]) -> list[Path]:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_text(directory / name, _text(content))
    return [directory / name for name in files]


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, separators=(",", ":"))
