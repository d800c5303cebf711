"""Samples of an image and a text from an annotation file, with their pictures looked at."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from cirloop.data.image_check import unreadable_images
from cirloop.data.images import FileImages, escapes_root
from cirloop.io import parse
from cirloop.retrieval.arrays import Rows
from cirloop.tools.add_negatives import locate
from cirloop.tools.add_negatives.text_reuse import normal
from cirloop.types import ImageId, UserError
from cirloop.validation import Entry, ValidationReport

logger = logging.getLogger(__name__)
LINES = (".jsonl", ".ndjson")
WRAPPERS = ("samples", "annotations", "data", "items", "questions", "images")
"""Keys under which other tools, and this one's result, have the whole list."""
FORM = (
    'Samples are a JSON list, [{"image": "a.jpg", "text": ".."}, ..], an object of such lists by'
    " split, or JSON lines (.jsonl), an object a line."
)
FIELDS = {"image", "text", "answer", "group", "split", "id"}
Progress = Callable[[Sequence[ImageId]], Iterable[ImageId]]


@dataclass(frozen=True, slots=True)
class Sample:
    """`image` is a path in the image directory. Samples of one group are never each other's
    negatives."""

    image: ImageId
    text: str
    group: str | None = None
    id: str | int | None = None

    def row(self) -> dict[str, Any]:
        """As in the result."""
        given = {"id": self.id, "group": self.group}
        return {
            **{k: v for k, v in given.items() if v is not None},
            "image": self.image,
            "text": self.text,
        }


@dataclass(frozen=True, slots=True)
class UniqueItems:
    """The images (V) and texts (T) of N samples, each once: files of equal content are one
    image."""

    images: tuple[ImageId, ...]
    texts: tuple[str, ...]
    image_of_N: Rows
    text_of_N: Rows
    group_of_N: Rows


def read(
    path: Path,
    split: str | None,
    max_samples: int | None,
    problems: ValidationReport,
    folder: Path | None = None,
) -> list[Sample]:
    """Return the samples of a file, or of its split, with pictures in `folder`. What is wrong with
    them is noted."""
    if kind := _other_kind(path):
        problems.add(path, kind, FORM)
        return []
    entries = list(_entries(path, split, problems))
    ignored = Counter[str]()
    samples = []
    for _, entry in entries if max_samples is None else entries[:max_samples]:
        ignored.update(entry.fields.keys() - FIELDS)
        found = _sample(entry, problems, folder)
        samples += [found] if found else []
    if ignored:
        logger.info("%s: fields that are not used: %s", path, ", ".join(sorted(ignored)))
    if len(samples) == 1 and not problems.rows:
        problems.add(path, "has one sample, which no other can be the negative of")
    return samples


def _entries(
    path: Path, split: str | None, problems: ValidationReport
) -> Iterator[tuple[str, Entry]]:
    """Yield the file's objects: of the split where it has splits, as keys of one object or as a
    field."""
    if path.suffix in LINES:
        entries = list(problems.json_lines(path))
    else:
        content = problems.json(path)
        if isinstance(content, dict):
            names = ", ".join(map(repr, content)) or "none"
            if split is None or split not in content:
                wrapped = [name for name in WRAPPERS if isinstance(content.get(name), list)]
                if wrapped:
                    problems.add(
                        path,
                        f"is an object that holds a list under {wrapped[0]!r}, which is no split",
                        f"Save the list under {wrapped[0]!r} alone as the file. {FORM}",
                    )
                    return
                what = (
                    "has splits, give one by --split"
                    if split is None
                    else f"has no split {split!r}"
                )
                problems.add(path, f"{what}; there are: {names}")
                return
            content, split, where = content[split], None, f"{path} {split}"
        else:
            where = str(path)
        entries = list(_listed(content, where, problems))
    if split is None:
        yield from entries
        return
    if locate.is_of(path, split) and not any("split" in entry.fields for _, entry in entries):
        yield from entries
        return
    splits = [entry.get("split", str) for _, entry in entries]
    if entries and split not in splits:
        there = ", ".join(sorted({repr(name) for name in splits if name})) or "none"
        problems.add(path, f"has no sample of the split {split!r}; there are: {there}")
    yield from (row for row, name in zip(entries, splits, strict=True) if name == split)


def _listed(content: Any, where: str, problems: ValidationReport) -> Iterator[tuple[str, Entry]]:
    if content is None and problems.rows:
        return
    if not isinstance(content, list) or not content:
        problems.add(where, "must be a list of samples, and not an empty one")
        return
    for number, fields in enumerate(content):
        if isinstance(fields, dict):
            yield f"{where} entry {number}", Entry(fields, f"{where} entry {number}", problems)
        else:
            problems.add(f"{where} entry {number}", "must be an object")


def _other_kind(path: Path) -> str:
    """Return what a file is that is neither JSON nor JSON lines as its name says; empty where
    nothing is known against it."""
    try:
        text = parse.read_text(path).strip()
    except UserError:  # it is said when the file is read
        return ""
    if path.suffix in LINES or not text.startswith(("[", "{")):
        form = parse.detect_format(text)
        return (
            form
            and f"is {form}, not {'JSON lines: name it .json' if text.startswith('[') else 'JSON'}"
        )
    head, _, rest = text.partition("\n")
    if head.startswith("{") and head.rstrip().endswith("}") and rest.lstrip().startswith("{"):
        return "holds JSON lines, an object a line, and by its name one JSON value: name it .jsonl"
    return ""


def _inside(image: str, folder: Path | None) -> str:
    """Return the name of a picture in `folder`; an absolute path below it is one too."""
    if folder is not None and image.startswith("/"):
        for root in (folder.absolute(), Path(os.path.realpath(folder))):
            if PurePosixPath(os.path.normpath(image)).is_relative_to(root):
                return os.path.relpath(os.path.normpath(image), root)
    return image


def _sample(entry: Entry, problems: ValidationReport, folder: Path | None) -> Sample | None:
    image = entry.get("image", str)
    text = entry.get(
        "text" if "text" in entry.fields or "answer" not in entry.fields else "answer", str
    )
    if image is not None and ".." not in PurePosixPath(image).parts:
        image = _inside(image, folder)
    if image is not None and escapes_root(image):
        what = "is absolute and not below" if image.startswith("/") else "leads out of"
        problems.add(entry.where, f"the path of {image!r} {what} the image directory")
        return None
    group = entry.fields.get("group")
    name = entry.fields.get("id")
    for field, value in (("group", group), ("id", name)):
        if isinstance(value, bool) or not isinstance(value, str | int | None):
            problems.add(entry.where, f"{field!r} must be text or a whole number")
            return None
    if image is None or text is None:
        return None
    return Sample(
        ImageId(image), " ".join(text.split()), None if group is None else str(group), name
    )


def check_images(
    samples: Sequence[Sample],
    folder: Path,
    workers: int,
    progress: Progress,
    problems: ValidationReport,
) -> None:
    """Note every picture that is missing or does not decode."""
    files = {sample.image: folder / sample.image for sample in samples}
    for image, what in unreadable_images(files, workers, progress).items():
        problems.add(
            files[image],
            what,
            "Put the pictures right, or take their samples out of the annotations.",
        )


def deduplicate(samples: Sequence[Sample], folder: Path) -> UniqueItems:
    """Images by content, texts by phrase, in the order of their first sample; groups numbered, none
    shared by none."""
    files = FileImages({sample.image: folder / sample.image for sample in samples})
    images: dict[str, tuple[int, ImageId]] = {}
    texts: dict[str, tuple[int, str]] = {}
    groups: dict[object, int] = {}
    rows = [
        (
            images.setdefault(files.digest(sample.image), (len(images), sample.image))[0],
            texts.setdefault(normal(sample.text), (len(texts), sample.text))[0],
            groups.setdefault((number,) if sample.group is None else sample.group, len(groups)),
        )
        for number, sample in enumerate(samples)
    ]
    of_image, of_text, of_group = np.array(rows, np.int64).reshape(-1, 3).T
    return UniqueItems(
        tuple(i for _, i in images.values()),
        tuple(t for _, t in texts.values()),
        of_image,
        of_text,
        of_group,
    )
