"""Sources of phrases: a file of them, or human texts about images of a catalogue."""

from __future__ import annotations

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from cirloop.data.changes import ANOTHER, Attributes, Changes, changes, fold, leads, tidy
from cirloop.data.names import nfc
from cirloop.data.phrases import GONE, Phrase, Phrasebook
from cirloop.io import parse
from cirloop.types import Triplet, UserError
from cirloop.validation import ValidationReport, counted

if TYPE_CHECKING:
    from cirloop.data.catalogue import Items

logger = logging.getLogger(__name__)
PHRASES_FORM = (
    'Phrases are a YAML file such as {"brand": ["the same {product} by {brand}"], "organic=yes":'
    ' ["the organic one"], "brand, flavour": ["{flavour}, by {brand}"]}; see docs/catalogue.md.'
)
ANSWERS = frozenset(("yes", "no", "true", "false"))
"""Values that name nothing by themselves: a "no" in a human text is not the attribute's."""


def read_phrases(path: Path, sections: Sequence[str] = ()) -> Phrasebook:
    """Read a YAML file of phrases, by the attributes that they change, or such `sections` of it.

    A key names them, with a comma between two; `organic=yes` is for a phrase that says this value
    without a slot, `organic=*` for one that asks for another value, `organic=` for one that says
    the attribute is gone. Raises ValidationFailed with all that is wrong.
    """
    problems = ValidationReport(PHRASES_FORM)
    content = None
    try:
        content = parse.read_yaml(path, yaml.BaseLoader)
    except UserError as error:
        problems.add(path, str(error))
    phrases: list[Phrase] = []
    for section in sections or [""]:
        part = content
        if section:
            part = content.get(section) if isinstance(content, dict) else None
        if not problems.rows and not (isinstance(part, dict) and part):
            where = f"{path} {section}".rstrip()
            problems.add(where, "must hold phrases by the attributes that they change")
        if isinstance(part, dict):
            phrases += _phrases_by_key(part, f"{path} {section}".rstrip(), problems)
    problems.raise_if_any()
    return Phrasebook(tuple(phrases))


def _phrases_by_key(
    content: Mapping[str, object], path: str, problems: ValidationReport
) -> list[Phrase]:
    phrases: list[Phrase] = []
    for key, texts in content.items():
        where = f"{path} {key!r}"
        said = [_key_part(part) for part in key.split(",")]
        if not all(name for name, _ in said):
            problems.add(where, "is no list of attributes, such as 'brand' or 'organic=yes, brand'")
        elif not isinstance(texts, list) or not texts:
            problems.add(where, "must hold a list of phrases")
        else:
            phrases += _phrases(texts, tuple(sorted(said)), where, problems)
    return phrases


def _key_part(part: str) -> tuple[str, str | None]:
    name, sign, value = nfc(part).partition("=")
    return tidy(name), tidy(value) if sign else None


def _phrases(
    texts: list[object],
    said: tuple[tuple[str, str | None], ...],
    where: str,
    problems: ValidationReport,
) -> list[Phrase]:
    phrases = []
    for text in texts:
        try:
            if not isinstance(text, str):
                raise UserError("must hold texts only")
            phrases.append(Phrase(tidy(nfc(text)), said))
        except UserError as error:
            problems.add(where, str(error))
    return phrases


def learn_phrases(triplets: Iterable[Triplet], items: Items) -> Phrasebook:
    """Learn phrases from human texts: what images differ in is known, and values become slots.

    Each value of target or reference that the text holds (whole words, any case, the longest
    first) becomes a slot. A changed value that it does not hold becomes part of the phrase's key,
    so that the phrase is for this value only; a text that stands for several values asks for
    another one, whichever. Raises UserError where nothing is learned.
    """
    phrases = []
    failures: Counter[str] = Counter()
    for triplet in triplets:
        reference = items.attributes(triplet.query.reference)
        target = items.attributes(triplet.target)
        if reference is None or target is None:
            failures["an image is not in the catalogue"] += 1
        elif not changes(reference, target):
            failures["reference and target have equal attributes"] += 1
        else:
            text = tidy(nfc(triplet.query.text))
            phrase = _learned(text, reference, target)
            if phrase is None:
                failures["the text cannot be read back to what changes"] += 1
            else:
                phrases.append(phrase)
    counts = "; ".join(f"{failure}: {num:,}" for failure, num in sorted(failures.items()))
    looked_at = counted(len(phrases) + failures.total(), "triplet")
    if not phrases:
        raise UserError(
            f"no phrase could be learned from the human texts of {looked_at}"
            f" ({counts or 'none is there'}). Give phrases by --foundation.phrases FILE."
            f" {PHRASES_FORM}"
        )
    logger.debug("learned %d phrases from %s; %s", len(phrases), looked_at, counts or "none failed")
    return Phrasebook(tuple(_generalize(phrases)))


def _generalize(phrases: Sequence[Phrase]) -> list[Phrase]:
    """Return the phrases, with `*` for the values of a text that stands for several of them."""
    values: dict[tuple[str, str], set[str]] = defaultdict(set)
    for phrase in phrases:
        for name, value in phrase.changes:
            if value not in (None, GONE):
                values[fold(phrase.text), name].add(fold(value))
    return [
        replace(
            phrase,
            changes=tuple(
                (name, ANOTHER if len(values[fold(phrase.text), name]) > 1 else value)
                for name, value in phrase.changes
            ),
        )
        for phrase in phrases
    ]


def _learned(text: str, reference: Attributes, target: Attributes) -> Phrase | None:
    """Return the phrase of a human text; None where it cannot be read back to the same changes."""
    text = tidy(text.removesuffix("."))
    if not text or "{" in text or "}" in text:
        return None
    delta = changes(reference, target)
    slots = _slots(reference, target, delta)
    pieces = []
    end = 0
    if slots:
        values = "|".join(map(re.escape, slots))
        for match in re.finditer(rf"(?<!\w)(?:{values})(?!\w)", fold(text)):
            pieces += [text[end : match.start()], slots[match[0]]]
            end = match.end()
    said = tuple(
        (name, None if f"{{{name}}}" in pieces else value or GONE) for name, value in delta.items()
    )
    phrase = Phrase("".join([*pieces, text[end:]]), said)
    readings = Phrasebook((phrase,)).read(text, reference)
    same_changes = any(leads(reference, read, target) for read in readings)
    return phrase if same_changes else None


def _slots(reference: Attributes, target: Attributes, delta: Changes) -> dict[str, str]:
    """Return the slot of each value, the longest value first.

    Of equal values a changed one comes first, then one that is kept, then one that was there.
    """
    rows = [
        *((target[name], f"{{{name}}}") for name in delta if name in target),
        *((value, f"{{{name}}}") for name, value in target.items() if name not in delta),
        *((reference[name], f"{{old {name}}}") for name in delta if name in reference),
    ]
    slots: dict[str, str] = {}
    for value, slot in sorted(rows, key=lambda row: -len(tidy(row[0]))):
        if fold(tidy(value)) not in ANSWERS:
            slots.setdefault(fold(tidy(value)), slot)
    return slots
