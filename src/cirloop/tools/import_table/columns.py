"""Which column is the reference, which the text, which the target: by flags or usual names."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from pathlib import PurePath

from cirloop.data.folder import image_suffixes
from cirloop.tools.import_table.tables import Table
from cirloop.validation import ValidationReport

REFERENCE = "reference"
TEXT = "text"
TARGET = "target"
ROLES = (REFERENCE, TEXT, TARGET)
IMAGE_WORDS = frozenset({"image", "img", "photo", "picture", "pic"})
FILE_WORDS = IMAGE_WORDS | {"file", "filename", "name", "path", "id", "url"}
"""Words of a column's name that say only that it names an image."""
NAMES = {
    REFERENCE: {"reference", "ref", "source", "src", "candidate", "anchor", "original", "before"},
    TEXT: {
        *("text", "texts", "caption", "captions", "modification", "modifier", "instruction"),
        *("edit", "change", "changes", "difference", "prompt", "description", "request"),
        *("relative_caption", "modification_text", "modifying_text", "query_text"),
    },
    TARGET: {"target", "target_hard", "positive", "answer", "result", "output", "after", "goal"},
}
"""Usual names of a role's column, without `FILE_WORDS`."""
IMAGE_ALONE = frozenset({"query", ""})
"""Names, without `FILE_WORDS`, that mean the reference beside one of `IMAGE_WORDS`."""
LISTS = ("positives", "subset")
"""Columns that hold lists of images, by these names only; JSON and Parquet have them."""
SHOWN = 12
"""Columns that a message shows."""


def roles_of(
    table: Table, by_flag: Mapping[str, str | None], problems: ValidationReport
) -> dict[str, str]:
    """Return the column of each role; report a role that no column or several have."""
    columns = {}
    for role, flag in by_flag.items():
        if flag is not None and flag not in table.columns:
            problems.add(f"--{role} {flag}", f"is no column; {_describe(table)}")
        elif flag is not None:
            columns[role] = flag
    unnamed = []
    for role in ROLES:
        if by_flag.get(role) is not None:
            continue
        fitting = _by_name(table, role, set(columns.values()))
        if len(fitting) == 1:
            columns[role] = fitting[0]
        elif fitting:
            names = " and ".join(map(repr, fitting))
            problems.add(f"--{role}", f"is needed, since the columns {names} may both be it")
        else:
            unnamed.append(role)
    if unnamed:
        problem = f"no column has a usual name for {' and '.join(unnamed)}; {_describe(table)}"
        flags = " ".join(f"--{role} COLUMN" for role in unnamed)
        problems.add(table.path, problem, _headless(table) or f"Name the columns by {flags}.")
    return columns | {name: name for name in LISTS if name in table.columns}


def _by_name(table: Table, role: str, taken: set[str]) -> list[str]:
    """Return the columns that a role may be by their names, without those that fit less well."""
    fitting = [name for name in table.columns if name not in taken and role in _meanings(name)]
    certain = [name for name in fitting if _words(name)[1] in NAMES[role]] or fitting
    return [name for name in certain if name.strip().casefold() == role] or certain


def _meanings(name: str) -> set[str]:
    """Return the roles that a column's name may mean."""
    image, words = _words(name)
    roles = {role for role, names in NAMES.items() if words in names}
    return roles | ({REFERENCE} if image and words in IMAGE_ALONE else set())


def _words(name: str) -> tuple[bool, str]:
    """Return whether a name has one of `IMAGE_WORDS`, and its words without `FILE_WORDS`."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", unicodedata.normalize("NFKC", name))
    words = re.findall(r"[a-z]+", spaced.casefold())
    rest = [word for word in words if word not in FILE_WORDS]
    return not IMAGE_WORDS.isdisjoint(words), "_".join(rest)


def _describe(table: Table) -> str:
    """List the columns, each with what its first row has."""
    first = table.rows[0].cells if table.rows else {}
    shown = [f"{name!r} ({first.get(name, '')!r:.60})" for name in table.columns[:SHOWN]]
    more = f" and {len(table.columns) - SHOWN} more" if len(table.columns) > SHOWN else ""
    return f"columns, each with its first cell: {', '.join(shown) or 'none'}{more}"


def _headless(table: Table) -> str:
    """Say so where the first line seems to be a row and no names of columns."""
    images = [name for name in table.columns if PurePath(name).suffix.lower() in image_suffixes()]
    if not images:
        return ""
    return (
        f"The first line has images ({images[0]!r}) and not the names of columns. Put a line before"
        " it, such as: reference,text,target"
    )
