"""Samples of an image and a text from an annotation file, with their images looked at."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from cirloop.backbones.base import deduplicate
from cirloop.data.images import FileImages, escapes_root
from cirloop.data.names import name_below
from cirloop.io import parse
from cirloop.negatives.text_reuse import normal
from cirloop.retrieval.arrays import Rows
from cirloop.tools.add_negatives import locate
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


@dataclass(frozen=True, slots=True)
class Sample:
    """`image` is a path in the image directory. Samples of one group are never each other's
    negatives."""

    image: ImageId
    text: str
    group: str | None = None
    id: str | int | None = None

    def row(self) -> dict[str, object]:
        """Return the sample as in the result."""
        row = {"id": self.id, "group": self.group, "image": self.image, "text": self.text}
        return {name: value for name, value in row.items() if value is not None}


@dataclass(frozen=True, slots=True)
class UniqueItems:
    """The images (V) and texts (T) of N samples, each once: files of equal content are one
    image."""

    images: tuple[ImageId, ...]
    texts: tuple[str, ...]
    image_of_N: Rows
    text_of_N: Rows
    group_of_N: Rows

    @classmethod
    def of_samples(cls, samples: Sequence[Sample], folder: Path) -> UniqueItems:
        """Take images by content and texts by phrase, in the order of their first sample; a sample
        without a group is its own."""
        files = FileImages({sample.image: folder / sample.image for sample in samples})
        image_of_N = _numbers([files.digest(sample.image) for sample in samples])
        text_of_N = _numbers([normal(sample.text) for sample in samples])
        groups = [n if sample.group is None else sample.group for n, sample in enumerate(samples)]
        images = tuple(samples[n].image for n in np.unique(image_of_N, return_index=True)[1])
        texts = tuple(samples[n].text for n in np.unique(text_of_N, return_index=True)[1])
        return cls(images, texts, image_of_N, text_of_N, _numbers(groups))


def _numbers(keys: Sequence[str | int]) -> Rows:
    """Return each key's number among the different ones, in the order of their first places."""
    return np.array(deduplicate(keys)[1], np.int64)


def read(
    path: Path,
    split: str | None,
    max_samples: int | None,
    problems: ValidationReport,
    folder: Path | None = None,
) -> list[Sample]:
    """Return the samples of a file, or of its split, with images in `folder`. What is wrong with
    them is noted."""
    kind = _other_kind(path)
    if kind:
        problems.add(path, kind, FORM)
        return []
    entries = _entries(path, split, problems)[:max_samples]
    ignored = {name for entry in entries for name in entry.fields.keys() - FIELDS}
    samples = [_sample(entry, problems, folder) for entry in entries]
    if ignored:
        logger.info("%s: fields that are not used: %s", path, ", ".join(sorted(ignored)))
    if len(samples) == 1 and not problems.rows:
        problems.add(path, "has one sample, which no other can be the negative of")
    return [sample for sample in samples if sample is not None]


def _entries(path: Path, split: str | None, problems: ValidationReport) -> list[Entry]:
    """Return the file's objects: of the split where it has splits, as keys of one object or as a
    field."""
    if path.suffix in LINES:
        entries = [entry for _, entry in problems.json_lines(path)]
    else:
        content = problems.json(path)
        where = str(path)
        if isinstance(content, dict):
            if split is None or split not in content:
                problems.add(path, *_no_split(content, split))
                return []
            content = content[split]
            where = f"{path} {split}"
            split = None
        if content is None and problems.rows:
            return []
        entries = [entry for _, entry in problems.objects(content, where)]
    has_splits = any("split" in entry.fields for entry in entries)
    if split is None or (not has_splits and locate.is_of(path, split)):
        return entries
    splits = [entry.get("split", str) for entry in entries]
    if entries and split not in splits:
        names = ", ".join(sorted({repr(name) for name in splits if name})) or "none"
        problems.add(path, f"has no sample of the split {split!r}; there are: {names}")
    return [entry for entry, name in zip(entries, splits, strict=True) if name == split]


def _no_split(content: dict[str, object], split: str | None) -> tuple[str, str]:
    """Return what is wrong with an object of lists that does not have the split, and what to do."""
    wrapped = [name for name in WRAPPERS if isinstance(content.get(name), list)]
    if wrapped:
        problem = f"is an object that holds a list under {wrapped[0]!r}, which is no split"
        return problem, f"Save the list under {wrapped[0]!r} alone as the file. {FORM}"
    problem = "has splits, give one by --split" if split is None else f"has no split {split!r}"
    return f"{problem}; there are: {', '.join(map(repr, content)) or 'none'}", ""


def _other_kind(path: Path) -> str:
    """Return what a file is that is neither JSON nor JSON lines as its name says; empty where
    nothing is known against it."""
    try:
        text = parse.read_text(path).strip()
    except UserError:  # it is said when the file is read
        return ""
    if path.suffix in LINES or not text.startswith(("[", "{")):
        form = parse.detect_format(text)
        right = "JSON lines: name it .json" if text.startswith("[") else "JSON"
        return form and f"is {form}, not {right}"
    head, _, rest = text.partition("\n")
    if head.startswith("{") and head.rstrip().endswith("}") and rest.lstrip().startswith("{"):
        return "holds JSON lines, an object a line, and by its name one JSON value: name it .jsonl"
    return ""


def _sample(entry: Entry, problems: ValidationReport, folder: Path | None) -> Sample | None:
    image = entry.get("image", str)
    has_answer = "text" not in entry.fields and "answer" in entry.fields
    text = entry.get("answer" if has_answer else "text", str)
    if folder is not None and image is not None and image.startswith("/"):
        roots = (os.path.abspath(folder), os.path.realpath(folder))
        below = None if ".." in PurePosixPath(image).parts else name_below(image, roots)
        image = below or image
    if image is not None and escapes_root(image):
        problem = "is absolute and not below" if image.startswith("/") else "leads out of"
        problems.add(entry.where, f"the path of {image!r} {problem} the image directory")
        return None
    for name in ("group", "id"):
        value = entry.fields.get(name)
        if isinstance(value, bool) or not isinstance(value, str | int | None):
            problems.add(entry.where, f"{name!r} must be text or a whole number")
            return None
    if image is None or text is None:
        return None
    group = entry.fields.get("group")
    as_text = None if group is None else str(group)
    return Sample(ImageId(image), " ".join(text.split()), as_text, entry.fields.get("id"))
