"""Rankings of any system from a JSON file: `{query id: [image ids, best first]}`.

Query ids are CIRR's pairid, CIRCO's id, FashionIQ's position in its captions file; over several
categories FashionIQ's are nested, `{category: {position: [..]}}`. CIRCO's submission is of this
form; so is CIRR's, with its two keys `version` and `metric`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cirloop.types import ImageId, LabeledQueries, QueryId
from cirloop.validation import Problems

NAMED = 3
"""Examples named per kind of problem."""
CIRR_KEYS = {"version": ("rc2",), "metric": ("recall", "recall_subset")}


def read(
    path: Path, parts: Sequence[LabeledQueries], problems: Problems
) -> tuple[dict[QueryId, list[ImageId]], str]:
    """The ranking of every query, and CIRR's `metric` if the file names one, else "". Adds what is
    wrong."""
    content = problems.json(path)
    if content is None:
        return {}, ""
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
        _unknown(
            path,
            "categories",
            [key for key in content if key not in {p.category for p in parts}],
            problems,
        )
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
    path: Path, part: LabeledQueries, rows: Mapping[str, Any], problems: Problems
) -> dict[QueryId, list[ImageId]]:
    where = f"{path} {part.category}".rstrip()
    outer = {query.id.removeprefix(f"{part.category}/"): query.id for query in part.queries}
    missing = [key for key in outer if key not in rows]
    if missing:
        problems.add(
            where, f"{len(missing)} of {len(outer)} queries are not ranked: {some(missing)}"
        )
    _unknown(where, "queries", [key for key in rows if key not in outer], problems)
    known = set(part.gallery.ids) if part.gallery else None
    out: dict[QueryId, list[ImageId]] = {}
    wrong: list[str] = []
    twice: list[str] = []
    foreign: list[str] = []
    for key, query in outer.items():
        row = rows.get(key, [])
        if not isinstance(row, list) or not all(
            isinstance(i, (str, int)) and not isinstance(i, bool) for i in row
        ):
            wrong.append(key)
            continue
        images = [ImageId(str(image)) for image in row]
        if not images and key in rows:
            wrong.append(key)
        if len(set(images)) < len(images):
            twice.append(key)
        if known is not None and not known.issuperset(images):
            foreign.append(f"{next(i for i in images if i not in known)!r} of query {key}")
        out[query] = images
    for what, found in (
        ("queries have no list of image ids", wrong),
        ("queries list an image more than once", twice),
        (
            (
                f"queries list images that the gallery {part.gallery.name if part.gallery else ''}"
                " does not have"
            ),
            foreign,
        ),
    ):
        if found:
            problems.add(where, f"{len(found)} {what}: {some(found)}")
    return out


def content(
    parts: Sequence[LabeledQueries], rankings: Sequence[Mapping[QueryId, Sequence[ImageId]]]
) -> dict[str, Any]:
    """What `read` reads, from the rankings of each part: nested by category where there are
    several."""
    each = {
        part.category: {
            query.id.removeprefix(f"{part.category}/"): list(rows[query.id])
            for query in part.queries
        }
        for part, rows in zip(parts, rankings, strict=True)
    }
    return dict(each) if len(parts) > 1 else next(iter(each.values()))


def _unknown(where: object, what: str, found: Sequence[str], problems: Problems) -> None:
    if found:
        problems.add(where, f"{len(found)} {what} are unknown: {some(found)}")


def some(found: Sequence[str]) -> str:
    """The first few, for a message."""
    return ", ".join(found[:NAMED]) + (", ..." if len(found) > NAMED else "")
