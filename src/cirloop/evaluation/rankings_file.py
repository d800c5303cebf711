"""Rankings of any system from a JSON file: `{query id: [image ids, best first]}`.

Query ids are CIRR's pairid, CIRCO's id, FashionIQ's position in its captions file; over several
categories FashionIQ's are nested, `{category: {position: [..]}}`. CIRCO's submission is of this
form; so is CIRR's, with its two keys `version` and `metric`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cirloop.types import ImageId, LabeledQueries, QueryId, Rankings
from cirloop.validation import ValidationReport, are, counted

MAX_EXAMPLES = 3
"""Examples that a message gives."""
CIRR_KEYS = {"version": ("rc2",), "metric": ("recall", "recall_subset")}


def read(
    path: Path, parts: Sequence[LabeledQueries], problems: ValidationReport
) -> tuple[dict[QueryId, list[ImageId]], str]:
    """Read the ranking of every query, and CIRR's `metric` if the file names one, else "".

    What is wrong is added to `problems`.
    """
    content = problems.json(path)
    return ({}, "") if content is None else check(content, path, parts, problems)


def check(
    content: object, path: object, parts: Sequence[LabeledQueries], problems: ValidationReport
) -> tuple[dict[QueryId, list[ImageId]], str]:
    """Return what `read` does, of what a file holds; `path` stands for it in messages."""
    if not isinstance(content, dict):
        problems.add(path, "must be an object {query id: [image ids, best first]}")
        return {}, ""
    metric = ""
    if parts[0].name.startswith("cirr"):
        for key, accepted in CIRR_KEYS.items():
            if key in content and content[key] not in accepted:
                problems.add(
                    path,
                    f"{key!r} must be {' or '.join(map(repr, accepted))}, found {content[key]!r}",
                )
        metric = str(content.get("metric", ""))
        content = {key: value for key, value in content.items() if key not in CIRR_KEYS}
    rankings: dict[QueryId, list[ImageId]] = {}
    if len(parts) > 1:
        categories = {part.category for part in parts}
        unknown = [key for key in content if key not in categories]
        _unknown(path, ("category", "categories"), unknown, problems)
    for part in parts:
        rows: Any = content
        if len(parts) > 1:
            rows = content.get(part.category)
            if not isinstance(rows, dict):
                problems.add(
                    path,
                    f"{part.category!r} must be an object {{position: [image ids, best first]}}",
                )
                continue
        rankings |= _part(path, part, rows, problems)
    return rankings, metric


def _part(
    path: object, part: LabeledQueries, rows: Mapping[str, object], problems: ValidationReport
) -> dict[QueryId, list[ImageId]]:
    """Check and return the rankings of one category; a query without one is left out."""
    where = f"{path} {part.category}".rstrip()
    queries = {query.id.removeprefix(f"{part.category}/"): query.id for query in part.queries}
    missing = [key for key in queries if key not in rows]
    if missing:
        problems.add(
            where, f"{len(missing)} of {len(queries)} queries are not ranked: {preview(missing)}"
        )
    others = [key for key in rows if key not in queries]
    _unknown(where, ("query", "queries"), others, problems)
    gallery_ids = set(part.gallery.ids) if part.gallery else None
    rankings: dict[QueryId, list[ImageId]] = {}
    malformed: list[str] = []
    repeated: list[str] = []
    foreign: list[str] = []
    for key, query in queries.items():
        images = _ranking(rows.get(key, []))
        if images is None:
            malformed.append(key)
            continue
        if not images and key in rows:
            malformed.append(key)
        if len(set(images)) < len(images):
            repeated.append(key)
        if gallery_ids is not None and not gallery_ids.issuperset(images):
            unknown = next(image for image in images if image not in gallery_ids)
            foreign.append(f"{unknown!r} of query {key}")
        rankings[query] = images
    gallery = part.gallery.name if part.gallery else ""
    for problem, keys in (
        ("queries have no list of image ids", malformed),
        ("queries list an image more than once", repeated),
        (f"queries list images that the gallery {gallery} does not have", foreign),
    ):
        if keys:
            problems.add(where, f"{len(keys)} {problem}: {preview(keys)}")
    return rankings


def _ranking(row: object) -> list[ImageId] | None:
    """Return the image ids of a list; None where it is no list of ids."""
    if not isinstance(row, list):
        return None
    if not all(isinstance(image, str | int) and not isinstance(image, bool) for image in row):
        return None
    return [ImageId(str(image)) for image in row]


def to_json(parts: Sequence[LabeledQueries], rankings: Sequence[Rankings]) -> dict[str, Any]:
    """Write the rankings as `read` reads them: nested by category where there are several."""
    by_category: dict[str, dict[str, list[ImageId]]] = {}
    for part, rows in zip(parts, rankings, strict=True):
        by_category[part.category] = {
            query.id.removeprefix(f"{part.category}/"): list(rows[query.id])
            for query in part.queries
        }
    return dict(by_category) if len(parts) > 1 else dict(next(iter(by_category.values())))


def _unknown(
    where: object, nouns: tuple[str, str], keys: Sequence[str], problems: ValidationReport
) -> None:
    """Add a problem where keys are unknown; `nouns` are what one and several are called."""
    if keys:
        num = len(keys)
        problems.add(where, f"{counted(num, *nouns)} {are(num)} unknown: {preview(keys)}")


def preview(names: Sequence[str]) -> str:
    """Join the first few names, for a message."""
    return ", ".join(names[:MAX_EXAMPLES]) + (", ..." if len(names) > MAX_EXAMPLES else "")
