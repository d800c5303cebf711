"""The JSON files that cirloop writes: the version of each kind's form.

A file says its version as `schema`, and one of another version is refused. Files that the manifest
does not vouch for carry a `digest` of their own content, so that a changed one is noticed. Lists of
ids, rankings and submissions have forms that others fixed and carry no version; neither do the
files that a process and its children exchange.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cirloop.io import parse
from cirloop.types import UserError

Content = dict[str, Any]
RESTORE = "Restore it from a backup, or start anew in another --experiment_dir."


@dataclass(frozen=True, slots=True)
class FileSchema:
    """The schema of one kind of file. A checksummed one carries its own digest; `remedy` is what to
    do about a damaged one."""

    version: int = 1
    checksummed: bool = False
    remedy: str = RESTORE


SCHEMAS = {
    "manifest": FileSchema(2, checksummed=True),
    "config": FileSchema(2, checksummed=True),
    "costs": FileSchema(2, checksummed=True, remedy="No result needs it: delete it."),
    "trackers": FileSchema(
        checksummed=True,
        remedy="No result needs it: delete its directory; what was tracked is tracked anew.",
    ),
    "images": FileSchema(2, checksummed=True, remedy="It is remade."),
    "state": FileSchema(checksummed=True, remedy="Delete its directory to train from the start."),
    "judge": FileSchema(),
    "hard_negatives": FileSchema(3),
    "augmented_samples": FileSchema(),
    "ranked_negatives": FileSchema(),
    "accounting": FileSchema(),
    "training_log": FileSchema(),
    "parts": FileSchema(),
    "evaluation": FileSchema(4),
    "evaluation_results": FileSchema(4),
    "problems": FileSchema(),
    "export": FileSchema(),
    "exported_model": FileSchema(),
    "scores": FileSchema(),
    "negatives": FileSchema(),
    "negatives_report": FileSchema(),
    "rates": FileSchema(remedy="Delete it and measure again: cirloop plan --measure --rates FILE."),
}
"""By name. A new form of a kind has a higher version."""


def kind_of(name: str) -> str:
    """Return the kind of a file: `hard_negatives` of `hard_negatives_iter_3.json`, `evaluation` of
    `evaluation_base.json`."""
    return re.sub(r"(_iter_\d+|_base)?\.json$", "", name)


def digest(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a JSON object in canonical form, without its own `digest`."""
    rest = {name: value for name, value in content.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, allow_nan=False).encode()).hexdigest()


def with_checksum(kind: str, content: Mapping[str, Any]) -> Content:
    """Add to the content of a file the version of its `kind` and its digest."""
    versioned = {"schema": SCHEMAS[kind].version, **content}
    return versioned | {"digest": digest(versioned)}


def read(path: Path, kind: str | None = None) -> Content:
    """Read a file that cirloop wrote, and return its content without the digest.

    Raises UserError, with the file named, where it cannot be read, is damaged or altered, or is of
    another version.
    """
    file_schema = SCHEMAS[kind or kind_of(path.name)]
    try:
        content = parse.parse_json(parse.read_text(path, 1 << 62))
        if not isinstance(content, dict):
            raise UserError("it holds no object")
        version = content.get("schema")
        if not isinstance(version, int) or isinstance(version, bool):
            raise UserError("it has no schema" if version is None else f"its schema is {version!r}")
    except UserError as error:
        raise UserError(f"{path} is damaged ({error}). {file_schema.remedy}") from None
    if version != file_schema.version:
        raise UserError(
            f"{path} was written by another version of cirloop (schema {version}; this one reads"
            f" {file_schema.version}). Use that version, or: {file_schema.remedy}"
        )
    if file_schema.checksummed and content.pop("digest", None) != digest(content):
        raise UserError(
            f"{path} is altered: its digest does not agree with the rest. {file_schema.remedy}"
        )
    return content
