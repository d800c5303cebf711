"""Attributes of a gallery's images: from a file, or extracted from captions of a file or a model.

All problems are reported together. An image that a file says nothing of, like an attribute that
it lacks, is unknown; a file that speaks of none of the gallery's images is an error.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cirloop.negatives.attributes.config import AttributeSettings, Extractor
from cirloop.negatives.attributes.lexicon import Lexicon
from cirloop.negatives.attributes.table import Table
from cirloop.negatives.attributes.values import join_values
from cirloop.types import ImageId
from cirloop.validation import ValidationReport

log = logging.getLogger(__name__)

CaptionImages = Callable[[Sequence[ImageId]], Sequence[str | None]]
"""Captions of images, one each, in their order; None for an image that has none that can be
used."""


def image_attributes(
    settings: AttributeSettings,
    extractor: Extractor,
    images: Sequence[ImageId],
    caption: CaptionImages | None = None,
) -> Table:
    """Return the attributes of the gallery's images, row by row. `caption` calls the foundation
    model, for the image source `vlm`.

    Raises ValidationFailed with everything that is wrong in the file or among the captions.
    """
    if settings.image_source == "vlm":
        assert caption is not None, "images from 'vlm' need a caption callable"
        captions = generated_captions(caption, images)
        return _table(
            dict(zip(captions, extractor.parse_caption([*captions.values()]), strict=True)), images
        )
    assert settings.file is not None  # the settings require it
    if settings.image_source == "metadata":
        return _table(metadata(settings.file, extractor.lexicon, images), images)
    texts = captions_file(settings.file, images)
    return _table(
        dict(zip(texts, extractor.parse_caption(list(texts.values())), strict=True)), images
    )


def metadata(
    path: Path, lexicon: Lexicon, images: Sequence[ImageId]
) -> dict[ImageId, dict[str, str]]:
    """Read the attributes of the images from a JSON file {image: {attribute: value}}, under the
    lexicon's names.

    A value is text, a list of texts, or null for unknown.
    """
    problems = ValidationReport(
        "Write it as {image: {attribute: value or list of values}}; null or no entry is unknown."
    )
    out: dict[ImageId, dict[str, str]] = {}
    for image, fields in _entries(problems, path, images).items():
        if not isinstance(fields, dict):
            problems.add(f"{path} {image!r}", f"must be an object, found {fields!r:.60}")
            continue
        out[image] = {}
        for name, value in fields.items():
            attribute = lexicon.attribute(name)
            joined = _values(problems, f"{path} {image!r} {name!r}", lexicon, attribute, value)
            if joined:
                out[image][attribute] = joined
    problems.raise_if_any()
    return out


def _values(
    problems: ValidationReport, where: str, lexicon: Lexicon, name: str, value: object
) -> str:
    if value is None:
        values: list[object] = []
    else:
        values = value if isinstance(value, list) else [value]
    wrong = [v for v in values if not isinstance(v, str) or not lexicon.value(name, v)]
    if not name:
        problems.add(where, "the attribute's name has no letters")
    if wrong:
        problems.add(where, f"must be text with letters or digits, found {wrong[0]!r:.60}")
        return ""
    return join_values(lexicon.value(name, str(v)) for v in values)


def captions_file(path: Path, images: Sequence[ImageId]) -> dict[ImageId, str]:
    """Read the captions of the images from a JSON file {image: caption}."""
    problems = ValidationReport("Write it as {image: caption}; no entry is unknown.")
    out = _entries(problems, path, images)
    for image, text in out.items():
        if not isinstance(text, str) or not text.strip():
            problems.add(f"{path} {image!r}", f"must be text that is not empty, found {text!r:.60}")
    problems.raise_if_any()
    return out


def generated_captions(caption: CaptionImages, images: Sequence[ImageId]) -> dict[ImageId, str]:
    """Generate captions of the images, without those that cannot be used.

    Raises ProblemsFound for an empty caption, and where none is left.
    """
    problems = ValidationReport("Look at these images and at the captioning model.")
    texts = list(caption(images))
    if len(texts) != len(images):
        problems.add("captions", f"the model gave {len(texts)} for {len(images)} images")
        problems.raise_if_any()
    captions = {image: text for image, text in zip(images, texts, strict=True) if text is not None}
    for image, text in captions.items():
        if not isinstance(text, str) or not text.strip():
            problems.add(image, f"the model gave no caption, but {text!r:.60}")
    if images and not captions:
        problems.add(
            "captions",
            f"none of the {len(images)} that the model gave had ended",
            "Raise captioning.max_new_tokens.",
        )
    problems.raise_if_any()
    return captions


def _entries(
    problems: ValidationReport, path: Path, images: Sequence[ImageId]
) -> dict[ImageId, Any]:
    """Return the file's entries of these images."""
    content = problems.json(path)
    if content is not None and not isinstance(content, dict):
        problems.add(
            path, f"must be an object with an entry per image, found {type(content).__name__}"
        )
    if not isinstance(content, dict):
        problems.raise_if_any()
        return {}
    entries = {image: content[image] for image in images if image in content}
    if images and not entries:
        problems.add(
            path,
            f"names none of the gallery's {len(images)} images; it names {list(content)[:3]}, "
            f"the gallery {list(images[:3])}",
        )
    return entries


def _table(known: Mapping[ImageId, Mapping[str, str]], images: Sequence[ImageId]) -> Table:
    rows = [known.get(image, {}) for image in images]
    log.info("attributes of %d of %d images known", sum(map(bool, rows)), len(rows))
    return Table(rows)
