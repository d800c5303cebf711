"""Validation of data and settings: problems are collected, so that one error reports all of
them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cirloop.io import parse
from cirloop.types import UserError

T = TypeVar("T")
MAX_CAUSES = 40
MAX_PER_CAUSE = 3
"""Problems of one cause that are shown one by one; of more the first stands for all."""
MAX_MESSAGE = 1000
"""Characters of a place or a problem in a message; a name in a file may be a megabyte."""
VARIES = re.compile(r"""(?<!has no )'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|\d[\d,]*|(?<=: )/.*$""")
"""What differs between problems of one cause: names in quotes, numbers, and a path at the end. A
field that entries lack is a cause of its own."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem: where it is (a file, an entry of it, an image) and what is wrong."""

    where: str
    what: str

    @property
    def cause(self) -> str:
        """What is the same in all problems of one cause. A flag's problem is its own."""
        return (
            f"{self.where if self.where.startswith('--') else ''}"
            f" {VARIES.sub('…', self.what[:MAX_MESSAGE])}"
        )


class ValidationFailed(UserError):
    """All problems in one error: `rows`, and `remedies` for them. The message has one line for each
    cause that has many problems."""

    def __init__(self, rows: Sequence[Problem], ways: Sequence[str]) -> None:
        self.rows = tuple(rows)
        self.remedies = tuple(ways)
        grouped = group_by_cause(rows)
        lines = [
            f"  {where:.{MAX_MESSAGE}}: {what:.{2 * MAX_MESSAGE}}"
            for where, what in grouped[:MAX_CAUSES]
        ]
        lines += [f"  and {len(grouped) - MAX_CAUSES} more"] if len(grouped) > MAX_CAUSES else []
        self.count = counted(len(rows), "problem")
        super().__init__("\n".join([f"{self.count}:", *lines, *ways]))


def counted(num: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun, such as "1 problem" and "2 problems"."""
    return f"{num:,} {noun}" if num == 1 else f"{num:,} {plural or f'{noun}s'}"


def are(num: int) -> str:
    """Return the verb of so many: "is" or "are"."""
    return "is" if num == 1 else "are"


def group_by_cause(rows: Sequence[Problem]) -> list[tuple[str, str]]:
    """Return where and what, in the order of each cause's first problem.

    Many problems of one cause become one line with their count.
    """
    causes: dict[str, list[Problem]] = {}
    for row in rows:
        causes.setdefault(row.cause, []).append(row)
    lines = []
    for group in causes.values():
        if len(group) <= MAX_PER_CAUSE:
            lines += [(row.where, row.what) for row in group]
            continue
        first, second, *_ = group
        more = f"{len(group) - 1:,} more like it, such as {second.where:.{MAX_MESSAGE}}"
        lines.append((first.where, f"{first.what:.{MAX_MESSAGE}} ({more})"))
    return lines


class ValidationReport:
    """A growing list of problems. `raise_if_any` raises them together; `way_out` is the remedy for
    all."""

    def __init__(self, way_out: str = "") -> None:
        self.rows: list[Problem] = []
        self.remedies: list[str] = []
        self._way_out = way_out

    def add(self, where: object, what: str, way_out: str = "") -> None:
        """Add a problem, with a remedy of its own where it has one."""
        self.rows.append(Problem(str(where), what))
        way = way_out or self._way_out
        if way and way not in self.remedies:
            self.remedies.append(way)

    def merge(self, error: UserError, where: str) -> None:
        """Add all problems of an error that was caught.

        An error that lists no problems is added as one, under `where`.
        """
        if not isinstance(error, ValidationFailed):
            self.add(where, str(error))
            return
        self.rows = list(dict.fromkeys([*self.rows, *error.rows]))
        self.remedies = list(dict.fromkeys([*self.remedies, *error.remedies]))

    def raise_if_any(self, way_out: str = "") -> None:
        """Raise ValidationFailed if there is any problem."""
        if self.rows:
            raise ValidationFailed(self.rows, [*self.remedies, *([way_out] if way_out else [])])

    def json(self, path: Path) -> Any:
        """Parse a JSON file; return None, and add the problem, where that is impossible."""

        text = self._text(path)
        num_before = len(self.rows)
        value = None if text is None else self._parsed(text, path)
        if text is not None and value is None and len(self.rows) == num_before:
            self.add(path, "holds nothing but null")
        return value

    def _parsed(self, text: str, where: object) -> Any:
        try:
            return parse.parse_json(
                text, lambda key: self.add(where, f"the key {key!r} is there more than once")
            )
        except UserError as error:
            self.add(where, str(error))
        return None

    def lines(self, path: Path) -> list[str]:
        """Return the stripped lines of a text file; none, with a problem added, where it cannot be
        read.

        Only a line feed ends a line: JSON may hold other characters that Python takes for one.
        """
        return [line.strip() for line in (self._text(path) or "").split("\n")]

    def _text(self, path: Path) -> str | None:
        try:
            return parse.read_text(path)
        except UserError as error:
            self.add(path, str(error))
        return None

    def json_lines(self, path: Path) -> Iterator[tuple[str, Entry]]:
        """Yield the objects of a JSON lines file, each with its place for messages; empty lines are
        skipped."""
        before = len(self.rows)
        num = 0
        text = self._text(path) or ""
        form = parse.detect_format(text)
        if form:
            self.add(
                path,
                f"is {form}, not JSON lines",
                f"JSON lines hold one object on each line, in braces. {self._way_out}".strip(),
            )
            return
        for number, line in enumerate(map(str.strip, text.split("\n")), 1):
            if not line:
                continue
            where = f"{path} line {number}"
            num = num + 1
            noted = len(self.rows)
            fields = self._parsed(line, where)
            if isinstance(fields, dict):
                yield where, Entry(fields, where, self)
            elif fields is not None or len(self.rows) == noted:
                self.add(where, f"must be an object, found {_kind(fields)}")
        if num == 0 and len(self.rows) == before:
            self.add(path, "holds no lines")

    def entries(self, path: Path) -> Iterator[tuple[str, Entry]]:
        """Yield the objects of a JSON list, each with its place for messages."""
        content = self.json(path)
        if content is not None:
            yield from self.objects(content, path)

    def objects(self, content: object, path: object) -> Iterator[tuple[str, Entry]]:
        """Yield the objects of a list that was parsed from `path`, each with its place for
        messages."""
        if not isinstance(content, list):
            self.add(path, f"must be a list of objects, found {_kind(content)}")
            return
        if not content:
            self.add(path, "holds no entries")
        for number, entry in enumerate(content):
            where = f"{path} entry {number}"
            if isinstance(entry, dict):
                yield where, Entry(entry, where, self)
            else:
                self.add(where, f"must be an object, found {_kind(entry)}")


class Entry:
    """One object of an annotation file; what it lacks is noted as a problem."""

    def __init__(self, fields: dict[str, Any], where: str, problems: ValidationReport) -> None:
        self.fields = fields
        self.where = where
        self._problems = problems

    def get(
        self, name: str, kind: type[T], optional: bool = False, blank: bool = False
    ) -> T | None:
        """Return the field `name` if it is of `kind`; None otherwise, with the problem noted. A
        text that holds nothing but blanks is a problem unless it may be `blank`."""
        if name not in self.fields or (optional and self.fields[name] is None):
            if not optional:
                self._problems.add(self.where, f"has no {name!r}")
            return None
        value = self.fields[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            self._problems.add(self.where, f"{name!r} must be {_name(kind)}, found {_kind(value)}")
            return None
        if kind is str and not blank and not value.strip():  # type: ignore[attr-defined]
            self._problems.add(self.where, f"{name!r} is empty")
            return None
        return value

    def list_of(self, name: str, kind: type[T]) -> list[T] | None:
        """Return the field `name` as a list of `kind`."""
        values = self.get(name, list)
        if values is None:
            return None
        wrong = [v for v in values if not isinstance(v, kind) or isinstance(v, bool)]
        if wrong:
            self._problems.add(
                self.where, f"{name!r} must hold only {_name(kind)}, found {_kind(wrong[0])}"
            )
            return None
        return values


def _name(kind: type) -> str:
    return {str: "text", int: "a whole number", list: "a list", dict: "an object"}[kind]


def _kind(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    return {
        str: "text",
        int: "a whole number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }[type(value)]
