"""The journal of a run's captioner: answers as they come, so that nothing is asked twice.

A line of a file is an answer under the digest of all that decides it, with a digest of its own. It
is written as soon as the answer is there, and what a killed run had been told the next attempt
finds. A line that was cut off, or does not agree with its digest, is no answer: its question is
asked again. Each process appends to a file of its own and reads those of all; in a directory
that runs share, those of other runs too.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

from cirloop.artifacts.fs import with_filename
from cirloop.artifacts.store import fingerprint
from cirloop.captioning.base import CaptionRequest
from cirloop.captioning.prompts import Prompt
from cirloop.types import Images

logger = logging.getLogger(__name__)
Json: TypeAlias = Any
"""A value of JSON, in the form that who wrote it knows."""
DIRECTORY = "answers"
"""Its place in a run's scratch directory, which is removed when the run is done."""


def key(
    model: str, prompt: Prompt, requests: Iterable[CaptionRequest], images: Images, *options: object
) -> str:
    """Return the digest of questions that are answered together, and of what else decides the
    answers.

    `model` is the captioner's fingerprint; `options` are the kind of answer, temperatures, seed and
    length. Images count by their content.
    """
    questions = [
        [images.digest(request.reference), images.digest(request.image), request.text]
        for request in requests
    ]
    return fingerprint([model, prompt.to_json(), questions, options])


class Journal:
    """Answers by key, in memory and in the files of `directory`."""

    def __init__(self, directory: Path, process: int = 0, shared: Path | None = None) -> None:
        """Read the answers in `directory`, if it is there, and those of all runs in `shared`;
        `process` is this process's number."""
        self.tokens = 0
        """Tokens, read and written, that a server counted for the answers in `directory`."""
        self._answers: dict[str, Json] = {}
        self._path = directory / f"{process}.jsonl"
        self._cut_off = 0
        """Bytes of a line that was not written to its end, at the end of this process's file."""
        others = [] if shared is None else shared.glob("*/*.jsonl")
        for path in sorted({*directory.glob("*.jsonl"), *others}):
            self._read(path)

    def _read(self, path: Path) -> None:
        *lines, rest = path.read_bytes().split(b"\n")
        if path == self._path:
            self._cut_off = len(rest)
        records = [*map(_parse, lines)]
        for key, answer, tokens in filter(None, records):
            self._answers[key] = answer
            self.tokens += tokens if path.parent == self._path.parent else 0
        damaged = records.count(None)
        if damaged:
            logger.warning("%s: %d damaged lines; what they answer is asked again", path, damaged)

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def __getitem__(self, key: str) -> Json:
        """Return the answer, as JSON; KeyError where there is none."""
        return self._answers[key]

    def add(self, key: str, answer: Json, tokens: int = 0) -> None:
        """Append an answer, which is JSON. Raises OSError where the disk refuses."""
        record = [key, answer, tokens]
        line = json.dumps([*record, fingerprint(record)]).encode()
        with with_filename(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab") as file:
                if self._cut_off:
                    file.truncate(file.tell() - self._cut_off)
                file.write(line + b"\n")
        self._cut_off = 0
        self._answers[key] = answer
        self.tokens += tokens


def _parse(line: bytes) -> tuple[str, Json, int] | None:
    """Return the record of a line; None where the line does not agree with its digest."""
    try:
        key, answer, tokens, digest = json.loads(line)
        return (key, answer, tokens) if fingerprint([key, answer, tokens]) == digest else None
    except (ValueError, TypeError, RecursionError):  # no JSON, or of another form
        return None
