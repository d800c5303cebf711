"""Queries as JSON lines, answered line by line in their order; a line that is wrong is answered
with its error.

{"reference": "dress/1.jpg", "text": "the same in red", "k": 3} {"line": 1, "reference": .., "text":
.., "results": [{"image": .., "score": .., "rank": 1}, ..], "ms": 12.3}
"""

from __future__ import annotations

import json
import stat
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cirloop.io import parse
from cirloop.io.redact import redact
from cirloop.tools.search.config import MAX_K
from cirloop.tools.search.engine import Answer, Engine
from cirloop.types import UserError

MAX_LINE = 1 << 20
"""Bytes of a line."""
KINDS: dict[str, tuple[type, str]] = {
    "reference": (str, "text: a path, or the id of an image of the gallery"),
    "text": (str, "text"),
    "k": (int, f"a whole number from 1 to {MAX_K}"),
}


@dataclass(frozen=True, slots=True)
class SearchQuery:
    """A query as it was given."""

    reference: str | None = None
    text: str | None = None
    k: int | None = None


def parse_line(line: bytes) -> SearchQuery:
    """Return a line's query. Raises UserError with all that is wrong with it."""
    if len(line) > MAX_LINE:
        raise UserError(f"has more than {MAX_LINE:,} bytes")
    try:
        fields = parse.parse_json(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise UserError("is not UTF-8 text") from None
    if not isinstance(fields, dict):
        raise UserError('must be an object such as {"reference": "a.jpg", "text": "in red"}')
    wrong = [f"unknown field {name!r:.100}" for name in fields if name not in KINDS]
    values = {name: value for name, value in fields.items() if name in KINDS and value is not None}
    for name, value in values.items():
        kind, description = KINDS[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            wrong.append(f"{name!r} must be {description}")
    if wrong:
        raise UserError(
            f"{'; '.join(wrong)}. A query has {', '.join(KINDS)}, each of which may be left out."
        )
    return SearchQuery(**values)


def answer(engine: Engine, label: str, query: SearchQuery, k: int, keep: bool) -> dict[str, Any]:
    """Return a query's answer as JSON. Raises UserError."""
    reference = None if query.reference is None else engine.reference(query.reference)
    result = engine.search(label, reference, query.text, k if query.k is None else query.k, keep)
    return {"reference": query.reference, "text": query.text, **content(result)}


def content(result: Answer) -> dict[str, Any]:
    results = [{"image": hit.image, "score": hit.score, "rank": hit.rank} for hit in result.hits]
    return {"results": results, "ms": round(result.ms, 3)}


def answers(
    engine: Engine, label: str, lines: Iterable[bytes], k: int, keep: bool
) -> Iterator[dict[str, Any]]:
    """Yield an answer for each line that is not empty, when it has been read."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = answer(engine, label, parse_line(line), k, keep)
        except UserError as error:
            row = {"error": redact(str(error))}
        yield {"line": number, **row}


def lines_of(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file, of standard input for `-`, one at a time. Raises UserError where
    there are none to read."""
    if str(path) == "-":
        yield from _lines(sys.stdin.buffer)
        return
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(
                f"--queries {path} is no file. Give a file of JSON lines, or - for standard input."
            )
        with path.open("rb") as file:
            yield from _lines(file)
    except OSError as error:
        raise UserError(f"--queries {path} cannot be read ({error.strerror}).") from None


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    """Only line feeds end a line. Of one that is too long the beginning, which `parse_line`
    refuses."""
    while line := file.readline(MAX_LINE + 1):
        rest = line
        while not rest.endswith(b"\n") and (rest := file.readline(MAX_LINE)):
            pass
        yield line


def write(row: dict[str, Any], out: IO[str] | None = None) -> None:
    """Write a JSON line, at once."""
    target = out or sys.stdout
    target.write(json.dumps(row, allow_nan=False) + "\n")
    target.flush()
