"""Tables as people keep them: CSV, Excel workbooks, Parquet, JSON, JSON lines.

What a file is shows in its content, not in its name.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cirloop.io import parse
from cirloop.types import UserError
from cirloop.validation import ValidationReport, counted

SEPARATORS = tuple(parse.SEPARATORS)
OLD_EXCEL = b"\xd0\xcf\x11\xe0"
OTHER_ENCODINGS = ("cp1252", "latin-1")
"""Tried in this order where a text is no UTF-8; the second reads any bytes."""
SAVE_AS = "Save it as CSV or .xlsx from the program that made it."


@dataclass(frozen=True, slots=True)
class Row:
    """A row: its place for messages, and its cells by column. An empty cell is ""."""

    where: str
    cells: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Table:
    """The rows of a file; `form` says what the file is."""

    path: Path
    form: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def read(path: Path, sheet: str | None, encoding: str | None, problems: ValidationReport) -> Table:
    """Read a table. Raises UserError where the file is none; problems of rows are reported."""
    try:
        content = parse.read_bytes(path)
        if content.startswith(b"PK\x03\x04"):
            return _workbook(path, content, sheet, problems)
        if content.startswith(b"PAR1"):
            return _parquet(path, content)
        if content.startswith(OLD_EXCEL):
            raise UserError(f"is a workbook of Excel before 2007. {SAVE_AS}")
        text, encoding = _decoded(content, encoding)
    except UserError as error:
        raise UserError(f"{path}: {error}{_beside(path)}") from None
    start = text.lstrip()[:1]
    one_line = "\n" not in text.strip()
    if start == "[" or (start == "{" and (one_line or parse.detect_format(text))):
        return _from_objects(path, "JSON", _json(path, text, problems))
    if start == "{":
        return _from_objects(path, "JSON lines", _json_lines(path, text, problems))
    return _csv(path, text, encoding, problems)


def _beside(path: Path) -> str:
    """Name the tables of a directory, or those beside a file that is not there."""
    folder = path if path.is_dir() else path.parent
    if path.is_file() or not folder.is_dir():
        return ""
    suffixes = {".csv", ".tsv", ".xlsx", ".parquet", ".json", ".jsonl", ".ndjson"}
    names = sorted(file.name for file in folder.iterdir() if file.suffix.lower() in suffixes)
    near = names if path.is_dir() else difflib.get_close_matches(path.name, names, 3) or names
    return f"; there is {', '.join(str(folder / name) for name in near[:10])}" if near else ""


def _decoded(content: bytes, encoding: str | None) -> tuple[str, str]:
    """Return a file's text and its encoding. Raises UserError for what is no text."""
    for start, kind in parse.FILE_SIGNATURES.items():
        if content.startswith(start) and "UTF-16" not in kind:
            raise UserError(f"is no table but {kind}")
    if encoding is None:
        encoding = _guess(content)
    try:
        text = content.decode(encoding)
    except LookupError:
        raise UserError(f"--encoding {encoding}: there is no encoding of that name") from None
    except UnicodeDecodeError as error:
        raise UserError(f"is not {encoding}: {error.reason} at byte {error.start:,}") from None
    if "\0" in text:
        raise UserError("is binary data, not a table. Give CSV, .xlsx, Parquet, JSON or JSON lines")
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    return text, encoding


def _guess(content: bytes) -> str:
    """Return the encoding that a text is in, by its byte order mark or by trying."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    if len(content) > 3 and b"\0" in content[:2]:
        return "utf-16-be" if content[0] == 0 else "utf-16-le"
    for name in ("utf-8", *OTHER_ENCODINGS):
        try:
            content.decode(name)
        except UnicodeDecodeError:
            continue
        return name
    raise AssertionError("latin-1 reads any bytes")


def _csv(path: Path, text: str, encoding: str, problems: ValidationReport) -> Table:
    first, _, rest = text.partition("\n")
    if re.fullmatch("sep=.", first, re.IGNORECASE):  # a line for Excel
        text = rest
        separator = first[4]
    else:
        separator = max(SEPARATORS, key=lambda sign: _num_cells(first, sign))
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    cells: list[tuple[str, Sequence[Any]]] = []
    try:
        for line in lines:
            cells.append((f"{path} line {lines.line_num}", line))
    except csv.Error as error:
        problems.add(f"{path} line {lines.line_num}", f"cannot be read as CSV ({error})")
    names = {"utf-8": "UTF-8", "cp1252": "Windows-1252, which has Latin-1 in it"}
    form = f"CSV with {parse.SEPARATORS.get(separator, repr(separator))}"
    return _from_cells(path, f"{form}, {names.get(encoding, encoding)}", cells, problems)


def _num_cells(line: str, separator: str) -> int:
    try:
        return len(next(csv.reader([line], delimiter=separator), []))
    except csv.Error:  # a cell that is longer than csv takes
        return 0


def _workbook(path: Path, content: bytes, sheet: str | None, problems: ValidationReport) -> Table:
    try:
        import openpyxl
    except ModuleNotFoundError:
        raise UserError(
            "is an Excel workbook, which openpyxl reads. Install it by: pip install"
            " 'cirloop[xlsx]'; or save the sheet as CSV"
        ) from None
    from zipfile import BadZipFile

    try:
        book: Any = openpyxl.load_workbook(io.BytesIO(content), read_only=True, data_only=True)
    except (BadZipFile, KeyError, ValueError, OSError) as error:
        raise UserError(f"is a zip archive but no Excel workbook ({error}). {SAVE_AS}") from None
    names = list(book.sheetnames)
    name = sheet or names[0]
    if name not in names:
        raise UserError(f"has no sheet {name!r}; there are: {', '.join(map(repr, names))}")
    rows = enumerate(book[name].iter_rows(values_only=True), 1)
    cells = [(f"{path} {name!r} row {number}", row) for number, row in rows]
    others = f" of {len(names)} (--sheet takes another)" if len(names) > 1 and not sheet else ""
    return _from_cells(path, f"Excel workbook, sheet {name!r}{others}", cells, problems)


def _from_cells(
    path: Path, form: str, lines: Iterable[tuple[str, Sequence[Any]]], problems: ValidationReport
) -> Table:
    """Make a table of lines, of which the first that is not blank has the columns' names."""
    texts = [(where, [_cell(value) for value in line]) for where, line in lines]
    filled = [(where, line) for where, line in texts if any(line)]
    if not filled:
        raise UserError(f"{path} holds no rows.")
    head, *body = filled
    columns = [str(name) for name in head[1]]
    while columns and not columns[-1]:
        columns.pop()
    for name, count in Counter(columns).items():
        if count > 1:
            problems.add(head[0], f"the column {name!r} is there {count} times")
    rows = []
    for where, line in body:
        if any(line[len(columns) :]):
            wrong = f"has {len(line)} cells, and there are {counted(len(columns), 'column')}"
            problems.add(where, wrong, "A text with the separator in it stands in quotes.")
        padded = [*line, *[""] * len(columns)]
        rows.append(Row(where, dict(zip(columns, padded, strict=False))))
    return Table(path, form, tuple(columns), tuple(rows))


def _parquet(path: Path, content: bytes) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table: Any = pq.read_table(pa.BufferReader(content))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"is a damaged Parquet file ({error})") from None
    rows = enumerate(table.to_pylist())
    return _from_objects(path, "Parquet", [(f"{path} row {number}", row) for number, row in rows])


def _json(
    path: Path, text: str, problems: ValidationReport
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the objects of a JSON list, which may be the only one in an object, or one object."""
    try:
        content = parse.parse_json(text)
    except UserError as error:
        raise UserError(f"{path} {error}") from None
    if isinstance(content, dict):
        lists = [key for key, value in content.items() if _is_rows(value)]
        if len(lists) > 1:
            names = ", ".join(map(repr, lists))[:200]
            raise UserError(f"{path} is an object with several lists of rows: {names}. Give one.")
        content = content[lists[0]] if lists else [content]
    for where, entry in problems.objects(content, path):
        yield where, entry.fields


def _is_rows(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _json_lines(
    path: Path, text: str, problems: ValidationReport
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            content = parse.parse_json(line.strip())
        except UserError as error:
            problems.add(where, str(error))
            continue
        if isinstance(content, dict):
            yield where, content
        else:
            problems.add(where, f"must be an object, found {json.dumps(content)[:60]}")


def _from_objects(path: Path, form: str, objects: Iterable[tuple[str, Mapping[str, Any]]]) -> Table:
    rows = [
        Row(where, {str(name): _cell(value) for name, value in fields.items()})
        for where, fields in objects
    ]
    columns = dict.fromkeys(name for row in rows for name in row.cells)
    return Table(path, form, tuple(columns), tuple(rows))


def _cell(value: object) -> object:
    """Return a cell as text without blanks around it, or as a list of texts; other values that are
    no number stay."""
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, list):
        return [_cell(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip() if isinstance(value, str | int | float) else value
