"""Atomic writes of text and JSON: beside the goal, synced, renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from cirloop.artifacts import schema
from cirloop.artifacts.fs import remove_stale_temp, sync_directory, with_filename
from cirloop.types import UserError


def write_text(path: Path, text: str) -> None:
    """Write a temporary file beside `path`, sync it, and rename it.

    Raises UserError where `path` is a directory, OSError where the disk refuses.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    remove_stale_temp(path.parent, f".{path.name}.")
    try:
        with with_filename(path), aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        with suppress(OSError):  # the first one counts
            aside.unlink(missing_ok=True)
        if isinstance(error, IsADirectoryError):
            raise UserError(
                f"{path} is a directory, where a file is to be written. Move it away."
            ) from None
        raise
    sync_directory(path.parent)


def format_json(value: object) -> str:
    """Format a value as JSON with one row of a list per line.

    Such files give small diffs, and are readable at any size.
    """
    if not isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"
    lines = []
    for key, item in value.items():
        if isinstance(item, list) and item:
            rows = ",\n  ".join(
                json.dumps(row, ensure_ascii=False, allow_nan=False) for row in item
            )
            lines.append(f" {json.dumps(key)}: [\n  {rows}\n ]")
        else:
            lines.append(
                f" {json.dumps(key)}: {json.dumps(item, ensure_ascii=False, allow_nan=False)}"
            )
    return "{\n" + ",\n".join(lines) + "\n}\n"


def write_json(path: Path, value: object) -> None:
    """Write a value as JSON, atomically."""
    write_text(path, format_json(value))


def write_checked(path: Path, kind: str, content: Mapping[str, Any]) -> None:
    """Write a JSON file with the version of its kind and a digest of its own.

    Files that no manifest covers are written by this function.
    """
    write_json(path, schema.with_checksum(kind, content))
