"""A catalogue: what images show, as attributes, and texts that lead from one image to another.

A shop knows the product, the brand and the flavour on each of its photographs. So a text for a pair
of images can be written from phrases (`phrases.py`), and whether one is right is known exactly.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import yaml

from cirloop.artifacts.store import fingerprint
from cirloop.data.changes import ANOTHER as ANOTHER
from cirloop.data.changes import Attributes as Attributes
from cirloop.data.changes import Changes as Changes
from cirloop.data.changes import changed as changed
from cirloop.data.changes import changes as changes
from cirloop.data.changes import leads, tidy
from cirloop.data.names import nfc
from cirloop.data.phrasebooks import learn_phrases as learn_phrases
from cirloop.data.phrasebooks import read_phrases as read_phrases
from cirloop.data.phrases import Phrase as Phrase
from cirloop.data.phrases import Phrasebook as Phrasebook
from cirloop.io import parse
from cirloop.types import ImageId, UserError
from cirloop.validation import ValidationReport

VERSION = "catalogue-1"
"""Of how texts are written, learned and read; fingerprints have it."""
ITEMS_FORM = (
    'A catalogue is a JSON file, or a YAML file of up to 256 KB, {"image or folder": {"attribute":'
    ' "value", ...}, ...}; see docs/catalogue.md.'
)
CLASSES = "classes"
"""The key under which a file may have its entries, beside notes."""


def read_items(path: Path) -> dict[str, dict[str, str]]:
    """Read a catalogue's entries, {name: {attribute: value}}, from JSON or YAML.

    A name is an image's, or that of a folder that images lie in. The entries may lie under the key
    `classes`. In YAML every value is a text, so that `organic: yes` needs no quotes. Raises
    ValidationFailed with all that is wrong.
    """
    problems = ValidationReport(ITEMS_FORM)
    content = _content(path, problems)
    if isinstance(content, dict) and _holds_entries(content.get(CLASSES)):
        content = content[CLASSES]
    if not problems.rows and not (isinstance(content, dict) and content):
        problems.add(path, "must be an object with an entry for each image or folder")
    entries: dict[str, dict[str, str]] = {}
    for name, fields in content.items() if isinstance(content, dict) else ():
        where = f"{path} {name!r}"
        image = nfc(name).strip().rstrip("/")
        if not image or image in entries:
            problems.add(where, "is there more than once" if image else "names nothing")
        elif not isinstance(fields, dict) or not fields:
            problems.add(where, 'must be an object of attributes, such as {"brand": "Bravo"}')
        else:
            entries[image] = _attributes(fields, where, problems)
    problems.raise_if_any()
    return entries


def _content(path: Path, problems: ValidationReport) -> object:
    """Parse the file by its suffix; return None, with the problem added, where that fails."""
    suffix = path.suffix.lower()
    if suffix == ".json":
        parsed: object = problems.json(path)
        return parsed
    if suffix not in (".yaml", ".yml"):
        problems.add(path, "is neither a .json nor a .yaml file")
        return None
    try:
        parsed = parse.read_yaml(path, yaml.BaseLoader)
    except UserError as error:
        problems.add(path, str(error))
        return None
    return parsed


def _holds_entries(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(entry, dict) for entry in value.values())


def _attributes(
    fields: Mapping[str, object], where: str, problems: ValidationReport
) -> dict[str, str]:
    attributes: dict[str, str] = {}
    for key, value in fields.items():
        name = tidy(nfc(key))
        if not name or name in attributes or set(name) & set("{}=,") or name.startswith("old "):
            problems.add(
                where,
                f"the attribute {key!r} must have a name of its own that does not begin with 'old '"
                " and holds none of { } = ,",
            )
        elif not isinstance(value, str) or not value.strip():
            problems.add(where, f"{key!r} must be a text in quotes that is not empty")
        else:
            attributes[name] = tidy(nfc(value))
    return attributes


@dataclass(frozen=True)
class Items:
    """The catalogue's entries: attributes by image, or by folder that images lie in."""

    entries: Mapping[str, Attributes]

    @property
    def names(self) -> frozenset[str]:
        """The attributes that entries have."""
        return frozenset(name for entry in self.entries.values() for name in entry)

    def attributes(self, image: ImageId) -> Attributes | None:
        """Return the image's own entry, else that of the innermost folder of its path with an
        entry; None where there is neither."""
        if image not in self._found:
            name: str = image
            while name and name not in self.entries:
                name = name.rpartition("/")[0]
            self._found[image] = self.entries.get(name)
        return self._found[image]

    @cached_property
    def _found(self) -> dict[ImageId, Attributes | None]:
        return {}


@dataclass(frozen=True)
class AttributeCatalogue:
    """A catalogue of attributes with words for their changes (`types.Catalogue`)."""

    items: Items
    phrasebook: Phrasebook
    max_changes: int = 2
    """Images that differ in more attributes have no text."""

    @cached_property
    def fingerprint(self) -> str:
        """The digest of entries, phrases and limit."""
        entries = {name: dict(entry) for name, entry in self.items.entries.items()}
        phrases = [[phrase.text, phrase.changes] for phrase in self.phrasebook.phrases]
        return fingerprint([VERSION, entries, phrases, self.max_changes])

    def write(self, reference: ImageId, image: ImageId, seed: int) -> str | None:
        """Write a text that leads from the reference to the image, drawn by the seed.

        Returns None where an image is not known, where they are equal or differ in more than
        `max_changes` attributes, and where no words are known.
        """
        before = self.items.attributes(reference)
        after = self.items.attributes(image)
        if before is None or after is None or len(changes(before, after)) > self.max_changes:
            return None
        rng = random.Random(f"catalogue/{seed}/{reference}/{image}")
        return self.phrasebook.write(before, after, rng)

    def is_true(self, reference: ImageId, text: str, image: ImageId) -> bool:
        """Return whether some reading of the text turns the reference's attributes into exactly the
        image's."""
        return bool(self.right(reference, text, [image]))

    def right(self, reference: ImageId, text: str, images: Sequence[ImageId]) -> list[ImageId]:
        """Return those of `images` for which `is_true`."""
        before = self.items.attributes(reference)
        if before is None:
            return []
        readings = self.phrasebook.read(text, before)
        right = []
        verdicts: dict[int, bool] = {}
        for image in images:
            after = self.items.attributes(image)
            if after is None:
                continue
            if id(after) not in verdicts:
                verdicts[id(after)] = any(leads(before, reading, after) for reading in readings)
            if verdicts[id(after)]:
                right.append(image)
        return right

    def knows(self, image: ImageId) -> bool:
        """Return whether the image, or a folder that it lies in, has an entry."""
        return self.items.attributes(image) is not None

    def limited(self, max_changes: int) -> AttributeCatalogue:
        """Return a catalogue that writes for images that differ in at most `max_changes`."""
        return replace(self, max_changes=max_changes)
